"""Every config for pods on its topologies: compiled one by one, kept as a table in docs/pods.md."""
