"""The check of machine code finds what it is for: products that read shared memory at what is no address of it."""

import re

import pytest
import torch
from kernels.descriptors import Form, lost_descriptors

from flashlib.launch.inspect import inspect

WINDOW = ["UMOV UR4, 0x400", "S2UR UR5, SR_CgaCtaId", "ULEA UR4, UR5, UR4, 0x18"]
SHIFT = "USHF.R.U32.HI UR6, URZ, 0x4, UR4"
PARAMETER = "ULDC.64 UR6, c[0x0][0x250]"
PRODUCT = "HGMMA.64x32x16.F32 R88, R28, gdesc[UR4].tnspB, R88"
BOTH_IN_SHARED_MEMORY = "HGMMA.64x32x16.F32 R88, gdesc[UR4], R88"


def found_in(*code: str) -> list[tuple[str, Form, tuple[int, ...]]]:
    """The findings in a kernel. Instruction n of ``code`` is at address 16 n; what ends with a colon is a label."""
    lines, address = [".text.kernel:"], 0
    for text in code:
        if text.endswith(":"):
            lines.append(text)
            continue
        guard, _, instruction = text.rpartition("  ")
        lines.append(f"        /*{address:04x}*/    {guard} {instruction} ;")
        address += 16
    return [(found.register, found.form, found.parameters) for found in lost_descriptors("\n".join(lines))]


def test_an_address_is_followed_to_the_product():
    assert found_in(*WINDOW, SHIFT, PRODUCT) == []
    moved = ["MOV R136, UR6", "IMAD.MOV.U32 R7, RZ, RZ, R136", PARAMETER, "R2UR UR6, R7"]
    assert found_in(*WINDOW, SHIFT, *moved, PRODUCT) == []
    ring = ["ULDC UR7, c[0x0][0x250]", "ULEA UR4, UR7, UR4, 0xd", SHIFT]  # where tiles begin may depend on parameters
    assert found_in(*WINDOW, *ring, PRODUCT) == []
    assert found_in(*WINDOW, "ULEA.HI UR6, UR4, UR9, URZ, 0x1c", "UIADD3.64 UR6, UR6, 0x2, URZ", PRODUCT) == []


def test_what_is_no_shifted_address_is_found():
    other, address = Form.OTHER, Form.ADDRESS
    assert found_in(PRODUCT) == [("UR6", other, ())]
    assert found_in(PARAMETER, PRODUCT) == [("UR6", other, (0,))]
    assert found_in(*WINDOW, SHIFT, PARAMETER, PRODUCT) == [("UR6", other, (64,))]
    assert found_in(*WINDOW, "UMOV UR6, UR4", PRODUCT) == [("UR6", address, ())]
    assert found_in(*WINDOW, SHIFT, "LDS R7, [R3+UR4]", "R2UR UR6, R7", PRODUCT) == [("UR6", other, ())]
    assert found_in(*WINDOW, SHIFT, "UMOV UR4, UR6", PARAMETER, BOTH_IN_SHARED_MEMORY) == [("UR6", other, (80,))]
    assert found_in(*WINDOW, SHIFT, BOTH_IN_SHARED_MEMORY) == [("UR4", address, ())]
    assert found_in(*WINDOW, SHIFT, "LDC.128 R4, c[0x0][0x210]", "R2UR UR6, R7", PRODUCT) == [("UR6", other, (64,))]


def test_every_path_counts():
    branch, target = "@P0  BRA `(.L_x_0)", ".L_x_0:"
    assert found_in(*WINDOW, SHIFT, branch, PARAMETER, target, PRODUCT) == [("UR6", Form.OTHER, (80,))]
    assert found_in(*WINDOW, SHIFT, branch, "BRA P1, `(.L_x_0)", "EXIT", PARAMETER, target, PRODUCT) == []
    assert found_in(*WINDOW, SHIFT, f"@P0  {PARAMETER}", PRODUCT) == [("UR6", Form.OTHER, (64,))]
    assert found_in(*WINDOW, SHIFT, f"@P0  {SHIFT}", PRODUCT) == []
    assert found_in(*WINDOW, SHIFT, "USEL UR6, UR6, UR7, UP0", PRODUCT) == [("UR6", Form.OTHER, ())]
    # The register is right when the loop begins, and wrong the second time.
    assert found_in(*WINDOW, SHIFT, target, PRODUCT, PARAMETER, branch) == [("UR6", Form.OTHER, (80,))]
    switch = 'BRX R2 -0x190 (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)'
    assert found_in(*WINDOW, switch, SHIFT, target, PRODUCT, "EXIT", ".L_x_1:", SHIFT, PRODUCT) == [
        ("UR6", Form.OTHER, ())
    ]


def test_a_product_that_no_branch_leads_to_is_no_pass():
    with pytest.raises(ValueError, match="none leads to HGMMA"):
        found_in(*WINDOW, SHIFT, "BRX R2 -0x190", ".L_x_0:", PRODUCT)


@pytest.mark.parametrize(
    "kernel, options",
    [
        ("forward", {"dtype": torch.float16, "head_dim": 128, "v_head_dim": 32, "window": (256, None)}),
        ("backward", {"head_dim": 64, "only": "backward_dkdv", "causal": True}),
    ],
)
def test_an_address_that_a_real_kernel_loses_is_found(kernel, options):
    (report,) = inspect(kernel, **options)
    assert lost_descriptors(report.sass) == []
    lines = report.sass.splitlines()
    shift = re.compile(r"^\s+/\*(\w+)\*/ +(?:USHF\.R\.U32\.HI|ULEA\.HI) (UR\d+), .*0x(?:4, UR\d+|1c) ;")
    shifts = [(at, match) for at, line in enumerate(lines) if (match := shift.match(line))]
    assert len(shifts) >= 4
    for at, (address, register) in ((at, match.groups()) for at, match in shifts):
        replaced = [*lines[:at], f"/*{address}*/ ULDC {register}, c[0x0][0x250] ;".rjust(60), *lines[at + 1 :]]
        found = lost_descriptors("\n".join(replaced))
        assert found and all(int(address, 16) in finding.parameters for finding in found), lines[at]
    # Left out, as the assembler did it: the register keeps what it held, which may be another descriptor.
    missing = [lost_descriptors("\n".join(lines[:at] + lines[at + 1 :])) for at, _ in shifts]
    assert sum(map(bool, missing)) > len(shifts) / 2
