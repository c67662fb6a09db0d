"""Names for addresses of code: of processes in whatever language, and of the kernel.

A sampled address lies in a mapping (`maps`), whose file (`files`, `elf`) or whose runtime
(`perf_map`) has symbols; `names` puts these together. Nothing here knows how addresses were
sampled, or where names go.
"""
