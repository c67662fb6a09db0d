"""User stacks from copied registers and stack bytes, many at once, in numpy.

`eh_frame` compiles a file's unwind table to rows, `tables` keeps the rows of files, `space` says
which rows hold at which address of which process, and `walk` unwinds samples with them. Collectors
use `unwinder`, which knows what processes have mapped. Nothing here knows the contract.
"""
