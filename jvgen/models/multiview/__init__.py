"""Collaborative Video Diffusion (CVD) on the video transformer: several views of one scene, denoised jointly.

Synchronization modules, ray embeddings, view conditioning, CameraCtrl's pose encoder, and maps of released weights.
Camera geometry is in `jvgen.geometry`, sampling of view pairs in `jvgen.diffusion.collaborative`, the loss in
`jvgen.tasks.multiview`.
"""
