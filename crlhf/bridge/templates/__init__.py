"""The files that an export writes for other programs to load. Each runs on its own, without this project."""
