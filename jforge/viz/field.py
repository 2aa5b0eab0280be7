"""The receptive field: the tokens that a mechanism says an output depends on, beside those that it does depend on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jforge.viz import style
from jforge.viz.toys import TOKENS, Toy, sizes, toy

HIDDEN, SKIPPED, SAID = range(3)
MAY = "#cfe3f1"
FAINTEST = 2  # powers of ten below the strongest influence of an output that still differ in colour


def said(small: Toy) -> np.ndarray:
    """int[T, T]: SAID where token t reads token s, SKIPPED where it may (`visible`) but another was picked.

    Read are the picks of `select` for each token and what is read without picking (`tokens_of`), and a token itself.
    """
    att, cfg, params, x = small
    T = x.shape[1]
    t = jnp.arange(T)
    seen = np.broadcast_to(att.visible(cfg, t[:, None], t), (T, T))
    step = jax.jit(lambda params, x, cache: (att.select(params, cfg, x, cache), att.decode(params, cfg, x, cache)[1]))
    cache, picks = att.init_cache(cfg, 1, T, jnp.float32), []
    for i in range(T):
        selection, cache = step(params, x[:, i : i + 1], cache)
        if selection is None:
            return np.where(seen, SAID, HIDDEN)
        picks.append(np.asarray(att.tokens_of(cfg, selection, T))[0, 0])
    always = np.asarray(att.tokens_of(cfg, None, T))[0]
    reads = (np.stack(picks) | always | np.eye(T, dtype=bool)) & seen
    return np.where(reads, SAID, np.where(seen, SKIPPED, HIDDEN))


def measured(small: Toy) -> np.ndarray:
    """float[T, T]: the length of dy_t/dx_s of `forward` in float64, of a random direction of y_t; 0 is exactly 0."""
    att, cfg, params, x = small
    T = x.shape[1]
    with jax.enable_x64(True):
        x, params = (jax.tree.map(lambda a: np.asarray(a, np.float64), tree) for tree in (x, params))
        probe = np.random.default_rng(2).standard_normal(x.shape[2])
        towards = np.eye(T)[..., None] * probe  # row t of the batch asks for output t alone

        @jax.jit
        def gradient(params, x, towards):
            return jax.vjp(lambda x: att.forward(params, cfg, x), x)[1](towards)[0]

        return np.linalg.norm(np.asarray(gradient(params, np.repeat(x, T, axis=0), towards)), axis=-1)


@style.styled
def receptive_field(names: str | Sequence[str], tokens: int = TOKENS):
    """Of each mechanism two squares, output down and input across: what it says, and what the gradients say.

    In the second a darker cell depends more; white is exactly no influence, vermillion an influence that is not
    visible and must not be.
    """
    names = [names] if isinstance(names, str) else names
    one = len(names) == 1
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    question = "Does an output depend on exactly the tokens that the mechanism reads?"
    of = f"outputs downwards, {tokens} tokens to the right; small layers"
    if one:
        question = f"{names[0]}: does an output depend on exactly the tokens that it reads?"
        of = f"outputs downwards, {tokens} tokens to the right; {sizes(toy(names[0], 1).cfg)}".removesuffix("; ")
    figure = style.sheet(question, 4.9 if one else 3.95 * lines + 0.9, of)
    axes = figure.subplots(1 if one else 2 * lines, 2 if one else columns, squeeze=False)
    for i, name in enumerate(names):
        row, column = 2 * (i // columns), i % columns
        pair = axes[0] if one else (axes[row, column], axes[row + 1, column])
        _pair(pair, toy(name, tokens))
        if one:
            pair[0].set_title("the mechanism says")
            pair[1].set_title("the gradients show")
        else:
            pair[0].set_title(name, weight="bold")
            if not column:
                pair[0].set_ylabel("the mechanism says")
                pair[1].set_ylabel("the gradients show")
    for ax in axes.flat:
        ax.set_visible(bool(ax.images))
    _legend(figure)
    return figure


def _pair(pair, small: Toy) -> None:
    from matplotlib.colors import ListedColormap

    claim, influence = said(small), measured(small)
    share = influence / influence.max(axis=1, keepdims=True)
    hidden = (influence > 0) & (claim == HIDDEN)
    top, below = pair
    top.imshow(claim, cmap=ListedColormap(["white", MAY, style.BLUE]), vmin=0, vmax=2, interpolation="none",
               label="said")  # fmt: skip
    magnitude = np.ma.masked_where(influence == 0, np.log10(share, where=share > 0, out=np.full_like(share, -9)))
    below.imshow(magnitude, cmap=_greens(), vmin=-FAINTEST, vmax=0, interpolation="none", label="measured")
    if hidden.any():
        below.imshow(np.ma.masked_where(~hidden, np.ones_like(share)), cmap=ListedColormap([style.VERMILLION]),
                     interpolation="none", label="not visible")  # fmt: skip
    T = len(claim)
    for ax in pair:
        ax.set(xticks=[0, T // 2, T - 1], yticks=[0, T // 2, T - 1])
        ax.tick_params(length=2, labelsize=7.5)


def _greens():
    """From a pale green, which is not white, to a dark one."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("influence", ["#d3ecdf", "#5fb596", style.GREEN, "#003d2c"])


def _legend(figure) -> None:
    from matplotlib.patches import Patch

    colours = _greens()
    marks = {
        "reads": style.BLUE, "may read, picked others": MAY, "strongest influence": colours(1.0),
        f"{100 * 10**-FAINTEST:.0f} % of it or less": colours(0.0), "none": "white",
    }  # fmt: skip
    patches = [Patch(facecolor=colour, edgecolor=style.GREY, linewidth=0.6) for colour in marks.values()]
    figure.legend(patches, list(marks), loc="outside lower left", ncols=5, frameon=False, fontsize=8.5,
                  handlelength=1.2, columnspacing=1.4)  # fmt: skip
