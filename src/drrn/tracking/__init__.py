"""Where metrics go besides the run record."""
