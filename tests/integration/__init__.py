"""The platform as its manifests and its guide say, as processes of this host: `make integration`.

What runs is read from the rendered manifests: commands, arguments, settings, Secrets, probes, and who may talk to whom.
What is typed is read from k8s/README.md. What is other here than in a cluster is listed in `substitutions`.
"""
