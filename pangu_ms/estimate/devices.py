"""What a device can do, by its vendor's word.

Every figure is a peak that no program reaches, and published figures of one device differ from page to page. They are
here to rank layouts and to see what binds; put measured ones in their place (a large bfloat16 product, a copy in
memory, hccl_test) before a plan rests on the seconds.
"""
from dataclasses import dataclass

from pangu_ms.errors import PanguError

USABLE = 0.9  # of the memory: CANN, HCCL's buffers and fragmentation take the rest (58 of 64 GB in our configs)
GIB = 2 ** 30


@dataclass(frozen=True)
class Device:
    """Peaks of one device. GB/s are 10^9 bytes per second; links count one direction.

    link: to the other devices of its server, all together; network: to other servers; per_server: devices in one.
    """

    name: str
    memory_gib: int
    memory_gb_per_s: float
    bfloat16_tflops: float
    float32_tflops: float
    link_gb_per_s: float
    network_gb_per_s: float
    per_server: int
    source: str

    @property
    def usable(self) -> float:
        """Bytes that a program may plan with."""
        return USABLE * self.memory_gib * GIB


_A2 = "Atlas 800 A2 data sheets: full mesh of 8 over HCCS, 392 GB/s both directions together, 200 Gbit/s RoCE each"
DEVICES = {device.name: device for device in (
    Device("910B-64GB", 64, 1600, 313, 78, 196, 25, 8, f"{_A2}; the 313 TFLOP/s bin (others are sold at 280 to 414)"),
    Device("910B-32GB", 32, 800, 280, 70, 196, 25, 8, f"{_A2}; the 280 TFLOP/s bin, half the memory and bandwidth"),
    Device("910C-die-64GB", 64, 1600, 376, 94, 196, 25, 384,
           "Huawei's CloudMatrix384 paper: a package is two of these dies; 196 GB/s unified bus each die"),
)}


def device(name: str) -> Device:
    if name not in DEVICES:
        raise PanguError(f"--device {name}: not in the table; wanted {' or '.join(DEVICES)}, "
                         "or add a line to pangu_ms/estimate/devices.py")
    return DEVICES[name]
