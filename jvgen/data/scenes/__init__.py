"""The embedded default data: procedural 3-D scenes with exact cameras, captions and labels, rendered without
dependencies. For demos and tests.
"""
