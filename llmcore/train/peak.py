"""The fastest that a GPU's tensor cores can be: what a run's arithmetic is a share of (MFU).

From NVIDIA's data sheets (V100, T4, A10, A10G, A30, A40, A100, L4, L40, L40S, H100, H200, GH200, B100, B200, GB200),
and for cards named RTX the appendices of the Ampere GA102, Ada and RTX Blackwell white papers; halved where they count
sparsity. A800 and H800 compute as A100 and H100 do, over slower links; of H20 there are resellers' figures only.
"""

import re

# Dense bf16, or fp16 where there is no bf16 (V100, T4), with sums in fp32. GeForce cards make those at half their fp16.
TFLOPS = {
    "V100": 125.0, "V100 PCIE": 112.0, "V100S PCIE": 130.0, "T4": 65.0,
    "A10": 125.0, "A10G": 70.0, "A30": 165.0, "A40": 149.7, "RTX A6000": 154.8, "RTX 3090": 71.0,
    "A100": 312.0, "A100 PCIE": 312.0, "A800": 312.0, "A800 PCIE": 312.0,
    "L4": 121.0, "L40": 181.0, "L40S": 362.0, "RTX 6000 ADA GENERATION": 364.2, "RTX 4080": 97.5, "RTX 4090": 165.2,
    "H100": 989.5, "H100 PCIE": 756.5, "H100 NVL": 835.5, "H800": 989.5, "H800 PCIE": 756.5, "H20": 148.0,
    "H200": 989.5, "H200 NVL": 835.5, "GH200": 989.5,
    "B100": 1750.0, "B200": 2250.0, "GB200": 2500.0, "RTX 5090": 209.5,
}  # fmt: skip
SAYS_NOTHING = re.compile(r"NVIDIA|TESLA|GEFORCE|SXM\d?|\d+GB?|HBM3E?")


def peak_tflops(device_name: str) -> float | None:
    """TFLOP/s of the GPU that torch.cuda.get_device_name gives this name; None where they are not known.

    All words count but the vendor's, the socket's and the memory's: what more a name says (Ti, Laptop GPU, MIG) makes
    it another GPU, or a part of one.
    """
    words = re.split(r"[\s-]+", device_name.upper().strip())
    return TFLOPS.get(" ".join(word for word in words if not SAYS_NOTHING.fullmatch(word)))
