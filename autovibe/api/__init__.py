"""Doors: each request is translated into one verb of the hub, each answer or error back. Nothing is decided here."""
