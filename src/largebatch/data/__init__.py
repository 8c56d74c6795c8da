"""Text and image data sets, prepared once and read deterministically."""
