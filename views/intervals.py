"""How long a tap has gathered: what an interval brought may come in several batches."""

from __future__ import annotations

from coral.mesh.v1 import ebpf_pb2 as pb


class Intervals:
    """The intervals that batches have told of."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of all
        self.latest_s = 0.0
        self._latest = 0, 0

    def begins(self, batch: pb.EbpfEventBatch) -> bool:
        """Takes a batch's interval in; whether it is another one than that of the batch before."""
        interval = batch.interval_start_ns, batch.interval_end_ns
        if interval == self._latest:
            return False
        self._latest = interval
        self.latest_s = (interval[1] - interval[0]) / 1e9
        self.seconds += self.latest_s
        return True
