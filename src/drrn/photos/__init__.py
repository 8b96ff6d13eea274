"""People's files: read, enlarged, written."""
