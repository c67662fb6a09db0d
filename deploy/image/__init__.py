"""The image from scratch and the Debian package: one tree, /usr/lib/coral, by one recipe.

The same sources, key and Debian packages give the same bytes on any machine. Nothing here needs
root, a container engine, or a network beyond apt's and pip's.
"""
