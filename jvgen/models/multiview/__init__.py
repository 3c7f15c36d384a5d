"""Several videos of one scene that agree (CVD) on the video transformer."""
