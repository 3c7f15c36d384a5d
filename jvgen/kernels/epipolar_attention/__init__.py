"""Attention along epipolar lines: the bias of a tile is made from three numbers a query and three a key."""
