"""Pods and containers of this node by name: which cgroups are theirs, and who says so.

`inventory` is the core, which knows neither files nor sockets; `cgroup_names`, `workloads` and
`attributes` read names. The sources (`cri`, `kubelet`, `api`) say whose a pod is, `changes` which
cgroups come and go, and `node` puts all of it together.
"""
