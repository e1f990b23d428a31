"""Guest images: recipes (images/*.yaml) and what is built of them, cached by the recipe's hash."""

from autovibe.images.build import build, built, image_path
from autovibe.images.host import host_ca_bundle, host_sources
from autovibe.images.recipe import Recipe, digest, recipe, recipes
from autovibe.images.tree import Progress

__all__ = [
    "Progress",
    "Recipe",
    "build",
    "built",
    "digest",
    "host_ca_bundle",
    "host_sources",
    "image_path",
    "recipe",
    "recipes",
]
