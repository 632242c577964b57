"""From labelled images to `models/<name>/`."""
