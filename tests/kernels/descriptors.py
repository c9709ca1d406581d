"""Does every product on Hopper's tensor cores read the shared memory that its kernel owns? The machine code is asked.

Why: the assembler is a program too. Of right kernels (16 bits, head_dim 128, v_head_dim 32, rows that begin at odd numbers) ptxas
12.8.93 made some in which the instruction with the address of V's tile is missing. The register that should have held it still
held something else: a stride, which is a parameter of the kernel, or the end of a loop, or half of another descriptor, and the
products read wherever that led. Nothing before the GPU's "illegal memory access" says so: PTX was right, nothing spilled, and an
offset that happens to be small gives wrong numbers in silence.

What is followed: HGMMA finds a factor in shared memory by a descriptor, 64 bits in two uniform registers. The low one holds the
address in units of 16 bytes, shifted right by 4 (PTX ISA, "Matrix Descriptor Format"). ``gdesc[UR44]`` names four registers: UR44
and UR45 describe A, if A is not in registers, and UR46 and UR47 describe B. On sm_90 every address of shared memory begins at the
window of the thread block in its cluster, which is computed from the special register SR_CgaCtaId. So the low word must have come
from that register and through that shift, on every path that leads to the product. All registers are followed from the beginning
of the kernel through moves, arithmetic and branches, and where paths meet, until nothing changes: a forward dataflow analysis
(Aho, Lam, Sethi and Ullman, "Compilers", 2nd edition, section 9.2).

Parameters may be in an address as well: a ring of tiles is entered at the number of tiles, which depends on lengths. That is why
the check asks for what must be there, and not for the absence of what need not be.

What it cannot see: a shifted address with a wrong offset, such as that of another tile; a wrong high word (strides and swizzle);
what registers without room left in local memory, which it takes to be right; the results of a called subroutine; and any other
instruction that addresses shared memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

FIRST_PARAMETER = 0x210  # of sm_90, in constant bank 0; below it lie the sizes of the launch and what the driver leaves
LABEL = re.compile(r"^([.$\w]+):")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"\b(U?R)(\d+)\b")
# LEA.HI shifts its first factor right by what is missing from 32 bits, here 4, and adds the second.
SHIFT_BY_4 = re.compile(r"U?SHF\.R.*, 0x4\b|U?LEA\.HI .*, 0x1c$")
PARAMETER = re.compile(r"c\[0x0\]\[(?:U?R\d+\+)?(0x[0-9a-f]+)\]")
BRANCH_TARGET = re.compile(r"\.L_x_\d+|(?<=`\()[^)]+")

# Instructions whose first operand is no register that they write, and those that write a predicate first and a register then.
WRITES_NOTHING = {"BAR", "BRA", "BRX", "CALL", "NANOSLEEP", "RET", "WARPSYNC"}
WRITES_PREDICATE_FIRST = {"ATOM", "ATOMG", "ELECT", "MATCH", "SHFL"}
LOADS = {"ATOM", "ATOMG", "ATOMS", "LD", "LDG", "LDS", "LDSM"}  # what they give is not made of their operands


class Form(IntEnum):
    """What a register was computed from. The greater one holds more of what a descriptor needs."""

    OTHER = 0
    ADDRESS = 1  # the window of shared memory is in it
    SHIFTED = 2  # and it is in units of 16 bytes


class Value(NamedTuple):
    """What is known of what a register holds.

    Attributes:
        form: what it is at least, on every path.
        parameters: the addresses of the instructions that loaded the parameters that are in it, on any path.
    """

    form: Form
    parameters: frozenset[int] = frozenset()


UNKNOWN = Value(Form.OTHER)
State = dict[str, Value]


@dataclass(frozen=True)
class Finding:
    """A product that reads shared memory at what is no address of it.

    Attributes:
        address: of the instruction. instruction: its text. register: the low word of the descriptor.
        form: what that register holds. parameters: the addresses of the instructions that loaded the parameters that are in it.
    """

    address: int
    instruction: str
    register: str
    form: Form
    parameters: tuple[int, ...]

    def __str__(self):
        loaded = ", ".join(f"{address:#06x}" for address in self.parameters)
        instead = "an address that was not shifted" if self.form is Form.ADDRESS else "no address of shared memory"
        return f"{self.address:#06x} {self.instruction}: {self.register} holds {instead}; parameters in it: {loaded or 'none'}"


@dataclass(frozen=True)
class Instruction:
    """One line of SASS. ``guard`` is the predicate under which it runs, ``name`` has its modifiers."""

    address: int
    guard: str | None
    name: str
    operands: str

    def __str__(self):
        return f"{self.name} {self.operands}"

    @cached_property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def written(self) -> list[str]:
        """The registers it writes."""
        destinations = self._split[0]
        if not (match := REGISTER.fullmatch(destinations)):
            return []
        file, first = match[1], int(match[2])
        return [f"{file}{first + word}" for word in range(self._words)]

    @cached_property
    def read(self) -> list[str]:
        """The registers it reads, of a 64-bit pair the low one."""
        return [match[0] for match in REGISTER.finditer(self._split[1])]

    @cached_property
    def _split(self) -> tuple[str, str]:
        """The register that is written, or nothing, and all other operands."""
        if self.kind in WRITES_NOTHING:
            return "", self.operands
        operands = self.operands
        if self.kind in WRITES_PREDICATE_FIRST:
            operands = operands.partition(", ")[2]
        first, _, others = operands.partition(", ")
        return (first, others) if REGISTER.fullmatch(first) else ("", operands)

    @cached_property
    def _words(self) -> int:
        modifiers = self.name.split(".")[1:]
        if self.kind == "HGMMA":
            columns = int(modifiers[0].split("x")[1])
            return columns // 2 if "F32" in modifiers else columns // 4
        if "128" in modifiers or modifiers[-2:] == ["M88", "4"]:
            return 4
        pair = {"64", "WIDE"} & {*modifiers} or modifiers[-2:] == ["M88", "2"] or self.name == "CS2R"
        if pair or (self.kind == "F2I" and {"S64", "U64"} & {*modifiers}):
            return 2
        return 1

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may run after this one."""
        # A branch has conditions besides its guard, too: BRA P4, `(.L_x_8).
        conditional = self.guard is not None or (self.kind == "BRA" and not self.operands.startswith("`"))
        return conditional or self.kind not in ("BRA", "BRX", "EXIT", "RET")

    @cached_property
    def targets(self) -> list[str]:
        """The labels it may jump to. BSYNC stands before the label that its BSSY names, so neither of them jumps."""
        return BRANCH_TARGET.findall(self.operands) if self.kind in ("BRA", "BRX", "CALL") else []

    def run(self, state: State) -> None:
        """Follow what it writes."""
        if not self.written:
            return
        value = self._result(state)
        for register in self.written:
            state[register] = join(state.get(register, UNKNOWN), value) if self.guard else value

    def _result(self, state: State) -> Value:
        if self.kind == "LDL":  # registers that were short of room
            return Value(Form.SHIFTED)
        if self.kind in LOADS:
            return UNKNOWN
        values = [state.get(register, UNKNOWN) for register in self.read]
        loaded = any(int(offset, 16) >= FIRST_PARAMETER for offset in PARAMETER.findall(self.operands))
        parameters = frozenset([self.address] if loaded else ()).union(*(value.parameters for value in values))
        return Value(self._form([value.form for value in values]), parameters)

    def _form(self, forms: list[Form]) -> Form:
        """Of the result, given those of the registers that are read."""
        if "SR_CgaCtaId" in self.operands:
            return Form.ADDRESS
        if self.kind in ("SEL", "USEL"):  # one of two, and a number is no address
            return min(forms) if len(forms) == 2 else Form.OTHER
        if SHIFT_BY_4.match(str(self)) and forms and forms[0] is Form.ADDRESS:
            return Form.SHIFTED
        return max(forms, default=Form.OTHER)

    @property
    def descriptors(self) -> list[str]:
        """The low words of the descriptors that it follows."""
        if self.kind != "HGMMA":
            return []
        first = int(re.search(r"gdesc\[UR(\d+)\]", self.operands)[1])
        a_in_registers = self.operands.split(", ")[1].startswith("R")
        return [f"UR{first + 2}"] if a_in_registers else [f"UR{first}", f"UR{first + 2}"]


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow. ``entry``: a kernel begins here."""

    labels: list[str]
    entry: bool
    instructions: list[Instruction]
    successors: list[int]


def join(a: Value, b: Value) -> Value:
    """What is known if either may be there."""
    return a if a is b else Value(min(a.form, b.form), a.parameters | b.parameters)


def join_states(a: State, b: State) -> State:
    return {register: join(a.get(register, UNKNOWN), b.get(register, UNKNOWN)) for register in a.keys() | b.keys()}


def blocks_of(sass: str) -> list[Block]:
    """The basic blocks of what nvdisasm -c prints, in the order of their addresses."""
    blocks = [Block([], False, [], [])]
    for line in sass.splitlines():
        if label := LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block([], False, [], []))
            blocks[-1].labels.append(label[1])
            blocks[-1].entry |= label[1].startswith(".text.")
        elif match := INSTRUCTION.match(line):
            instruction = Instruction(int(match[1], 16), match[2], match[3], match[4])
            blocks[-1].instructions.append(instruction)
            if instruction.targets or not instruction.falls_through:
                blocks.append(Block([], False, [], []))
    at = {label: index for index, block in enumerate(blocks) for label in block.labels}
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last is not None:
            block.successors = [at[target] for target in last.targets]
        if (last is None or last.falls_through) and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def lost_descriptors(sass: str) -> list[Finding]:
    """The products of a kernel for sm_90, as text from nvdisasm -c, that read shared memory at what is no address of it.

    Raises:
        ValueError: no path that was understood leads to some product, so that it cannot be checked.
    """
    blocks = blocks_of(sass)
    before: dict[int, State] = {index: {} for index, block in enumerate(blocks) if block.entry}
    waiting = set(before)
    while waiting:
        index = min(waiting)  # in order of addresses, so that most blocks see all that comes before them at once
        waiting.remove(index)
        state = dict(before[index])
        for instruction in blocks[index].instructions:
            instruction.run(state)
        for successor in blocks[index].successors:
            known = before.get(successor)
            joined = state if known is None else join_states(known, state)
            if joined != known:
                before[successor] = joined
                waiting.add(successor)
    unreached = [block for index, block in enumerate(blocks) if index not in before]
    if products := [str(i) for block in unreached for i in block.instructions if i.descriptors]:
        raise ValueError(f"sass must have branches that can be followed to every product; none leads to {products[0]}")
    return [finding for index, state in before.items() for finding in _found(blocks[index], dict(state))]


def _found(block: Block, state: State) -> list[Finding]:
    """The findings in a block, given what is known where it begins."""
    findings = []
    for instruction in block.instructions:
        for register in instruction.descriptors:
            value = state.get(register, UNKNOWN)
            if value.form is not Form.SHIFTED:
                loads = tuple(sorted(value.parameters))
                findings.append(Finding(instruction.address, str(instruction), register, value.form, loads))
        instruction.run(state)
    return findings
