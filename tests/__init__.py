"""The suite; a package, so that tests can share helpers."""
