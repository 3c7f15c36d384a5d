"""Diffusion as pure functions of arrays: noise schedules, training targets, samplers, guidance, and collaborative
sampling of several views. Networks are arguments here.
"""
