"""Users' image files: reading, enlarging, writing."""
