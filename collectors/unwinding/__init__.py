"""User stacks from copied registers and stack bytes, many at once, in numpy.

`eh_frame` compiles a file's unwind tables to rows, `cache` keeps them by build id, `space` says which
rows hold at which address of which process, and `walk` unwinds samples with them. Nothing here
touches a process or knows the contract.
"""
