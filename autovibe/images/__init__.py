"""Guest images: recipes (images/*.yaml) and what is built of them, cached by the recipe's hash."""

from autovibe.images.build import Progress, build, built
from autovibe.images.host import host_ca_bundle, host_sources
from autovibe.images.recipe import Recipe, digest, recipe, recipes

__all__ = ["Progress", "Recipe", "build", "built", "digest", "host_ca_bundle", "host_sources", "recipe", "recipes"]
