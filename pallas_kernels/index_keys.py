"""Parts that the two index kernels share: the keys of a row, read once in tiles of 64, and the programs over them.

Warpgroup 1 brings the tiles in by TMA; warpgroup 0 multiplies and reduces, and nothing but the scores is written. Query
rows come in boxes of 8, as in tiles.py. Tiles that no query sees are not read. Each row's tiles are shared evenly among
its programs on the device; a score does not depend on who computes it.
"""

from dataclasses import dataclass

from jforge.ops import check
from pallas_kernels import limits, ring
from pallas_kernels.compat import jnp, lax, pl, plgpu, swizzled
from pallas_kernels.plan import RESERVED, card, planned
from pallas_kernels.tiles import BOX, launch_programs

KEYS = 64  # of a tile
PROGRAMS = 2  # on one SM
WAVES = 2  # of programs, so that rows of different lengths share the card
LEAST = 8  # tiles of a program, unless the card would idle
NARROW = plgpu.Layout.WGMMA_UPCAST_2X  # for tiles of 8-bit elements: a thread holds 4 neighbours


def refuse(q, k, lengths, k_scale) -> None:
    """ValueError for lengths outside of the cache, NotImplementedError for what neither op has a kernel."""
    (B, T, heads, J), S = q.shape, k.shape[1]
    check.length_values(lengths, S)
    if k_scale is not None:
        limits.need(k_scale.dtype == jnp.float32, f"k_scale has dtype {k_scale.dtype}; the kernel takes float32")
    limits.halves("q_index", q.dtype)
    limits.slots("k_index", "S", S)
    limits.width("k_index", "J", J, 32 // k.dtype.itemsize, 256, f" for {k.dtype}")
    limits.grid("q_index", "B", dict(B=B, T=T, I=heads))


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """Everything static about one call."""

    T: int
    J: int
    S: int
    heads: int  # g, real rows of a box
    units: int  # boxes of a query, or of all queries where their rows are alike
    share: int  # queries, or boxes, of one program
    row_blocks: int  # programs of the same keys
    stages: int
    splits: int
    size: int = 0  # of a block

    @property
    def padded(self):
        """Rows of all boxes, with those that are not real."""
        return BOX * self.units

    @property
    def group(self):
        """Tiles whose scores leave together: those of 8 blocks, or one."""
        return max(1, BOX * self.size // KEYS)


def deepest(J, rows, k_dtype) -> int:
    """The deepest ring, up to 8 tiles, that leaves room for a second program, else for one."""
    wide = 2 * KEYS * J if k_dtype.itemsize == 1 else 0
    tile, fixed = KEYS * (J * k_dtype.itemsize + 4), RESERVED + wide + rows * (2 * J + 16)
    fit = [(card().smem // programs - fixed) // tile for programs in (PROGRAMS, 1)]
    return min(8, fit[0] if fit[0] >= 3 else fit[1])


def share_splits(programs, S, group=KEYS) -> int:
    """Programs of a row: as many as fill the card, and more where that leaves each of them enough groups of keys."""
    slots, groups, least = PROGRAMS * card().sms, -(-S // group), -(-LEAST * KEYS // group)
    most = max(1, slots // programs, min(WAVES * slots // programs, groups // least))
    return planned("splits", lambda: min(groups, most))


def launch_index(body, f, operands, out_type, rows, name, **scratch):
    """The kernel `body`, with programs of the same keys side by side, so that they share L2. rows: of q_s."""
    q, k = operands["q"], operands["k"]
    scaled, tiles = k.dtype.itemsize == 1, swizzled(f.J, 2)
    scratch |= dict(
        k=ring.lane(f, (KEYS, f.J), k.dtype, copies=2 if scaled else 1),
        q_s=plgpu.SMEM((rows, f.J), q.dtype, transforms=tiles),
    )
    if scaled:
        scratch |= dict(
            scale_s=plgpu.SMEM((f.stages, KEYS), jnp.float32),
            wide_s=plgpu.SMEM((KEYS, f.J), q.dtype, transforms=tiles),
        )
    return launch_programs(body, f, operands, out_type, scratch, (q.shape[0], f.splits, f.row_blocks), name)


class Share:
    """What one program works on: of row b the tiles first .. first + steps - 1, which some query sees, and `unseen`
    groups from `dark` on, which get -inf. A group is the tiles whose scores leave together.

    8-bit keys come with a scale each and are widened to the queries' dtype, in which they are exact: wgmma multiplies
    operands of one type.
    """

    def __init__(self, f, given, k, scale_s=None, wide_s=None):
        self.f, self.keys, self.scale = f, given["k"], given.get("k_scale")
        self.k, self.scale_s, self.wide_s = k, scale_s, wide_s
        self.b, split, self.rows = (lax.axis_index(name) for name in ("b", "split", "head"))
        self.n = given["lengths"][self.b]
        end = lax.div(self.n + (KEYS - 1), jnp.int32(KEYS))
        seen = lax.div(end + (f.group - 1), jnp.int32(f.group))
        total = -(-f.S // (KEYS * f.group))
        first, count = self._cut(split, seen)
        self.first = first * f.group
        self.steps = jnp.maximum(jnp.minimum((first + count) * f.group, end) - self.first, 0)
        first, self.unseen = self._cut(split, total - seen)
        self.dark = seen + first

    def _cut(self, split, total):
        """(first, count) of this split's even share of `total`."""
        per = lax.div(total + (self.f.splits - 1), jnp.int32(self.f.splits))
        first = split * per
        return first, jnp.clip(total - first, 0, per)

    def run(self, boxes, q_s, q_full, consume):
        """The two warpgroups. boxes: (source, its rows of q_s)."""

        def produce():
            for source, rows in boxes:
                plgpu.copy_gmem_to_smem(source, q_s.at[rows], q_full)
            ring.fill(self.f, self.steps, self._fetch, self.k)

        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(consume)
        pl.when(warpgroup == 1)(produce)

    def _fetch(self, i, slot, reuse):
        keys, full = pl.ds((self.first + i) * KEYS, KEYS), self.k.full.at[slot]
        reuse(lambda: self.k.free.at[slot])
        plgpu.copy_gmem_to_smem(self.keys.at[self.b, keys], self.k.tiles.at[slot], full)
        if self.scale is not None:
            plgpu.copy_gmem_to_smem(self.scale.at[self.b, keys], self.scale_s.at[slot], full)

    def take(self, i, layout):
        """The i-th tile as an operand of an MMA, and its scales as a vector in `layout`, or None."""
        slot = ring.slot_of(self.f, i)
        plgpu.barrier_wait(self.k.full.at[slot])
        tile = self.k.tiles.at[slot]
        if self.scale is None:
            return tile, None
        keys, factor = plgpu.load(tile, layout=NARROW), plgpu.load(self.scale_s.at[slot], layout=layout)
        if keys.dtype != jnp.int8:
            keys = keys.astype(jnp.float16)  # the only conversion of 8-bit floats that sm_90 has
            keys = keys if self.wide_s.dtype == jnp.float16 else keys.astype(jnp.float32)
        self.wide_s[...] = keys.astype(self.wide_s.dtype)
        plgpu.commit_smem()  # for the MMA, and for the copy that overwrites what was read here
        return self.wide_s, factor

    def give_back(self, i):
        plgpu.barrier_arrive(self.k.free.at[ring.slot_of(self.f, i)])

    def darken(self, clear, store):
        """After the loop: clear() makes -inf of the first staging buffer, store(group) sends it to each unseen group;
        and wait until nothing is read from shared memory any more."""

        @pl.when(self.unseen > 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            clear()
            plgpu.commit_smem()
            pl.loop(0, self.unseen)(lambda i: store(self.dark + i))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
