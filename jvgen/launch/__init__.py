"""Files that start runs on Slurm, GKE, Cloud TPU VMs, SkyPilot or one machine, made from the config. Topology, labels,
processes, mesh and exit codes are derived from one another, so that they cannot disagree.
"""
