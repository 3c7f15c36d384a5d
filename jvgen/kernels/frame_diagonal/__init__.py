"""Attention of frames to themselves: the diagonal of attention among the frames at one place, summed. The reference
works on whole sequences; `shifted` also on a part of the queries, and without products of small matrices.
"""
