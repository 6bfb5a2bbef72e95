"""FP8 attention: the rotation moves outliers alone, codes lose what E4M3 loses, kernels get what they expect."""

import sys
import types

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.functional import scaled_dot_product_attention

from omni_convert.formats.errors import KernelError
from omni_convert.loaders.attention.arithmetic import attend, quantize_per_head, rotate_heads, rotated_scale
from omni_convert.loaders.attention.kernels import ATTENTION_KERNELS, select_attention_kernel

CPU = torch.device("cpu")


def heads(seed: int, tokens: int = 96, count: int = 4, head_dim: int = 64) -> torch.Tensor:
    """[2, tokens, count, head_dim] in bfloat16."""
    return torch.randn(2, tokens, count, head_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def run(backend: str, *qkv: torch.Tensor, **options: object) -> torch.Tensor:
    return dispatch_attention_fn(*qkv, backend=AttentionBackendName(backend), **options)


@pytest.mark.parametrize("head_dim", [1, 2, 32, 64, 128, 256])
def test_the_rotation_is_orthogonal_and_exact_in_bfloat16(head_dim):
    identity = torch.eye(head_dim, dtype=torch.float64)
    matrix = rotate_heads(identity)
    assert torch.equal(matrix, rotate_heads(identity.bfloat16()).double())
    assert torch.equal(matrix @ matrix.T * rotated_scale(1.0, head_dim), identity)


def test_a_rotated_outlier_lies_in_every_channel():
    outlier = torch.zeros(64)
    outlier[5] = 64.0
    assert torch.equal(rotate_heads(outlier).abs(), torch.full((64,), 8.0))


def test_heads_that_cannot_be_rotated_are_refused():
    with pytest.raises(KernelError, match="found heads of 96, expected a power of two; use rotate=False"):
        rotate_heads(torch.ones(1, 96))


def test_each_head_of_each_picture_has_its_scale():
    x = heads(0)
    x[1, :, 2] *= 100
    codes, descale = quantize_per_head(x, 4)
    assert codes.dtype == torch.float8_e4m3fn
    assert descale.dtype == torch.float32
    assert torch.equal(descale, x.float().abs().amax((1, 3)) / 448)
    assert torch.equal(codes.float().abs().amax((1, 3)), torch.full((2, 4), 448.0))
    assert torch.equal(quantize_per_head(torch.zeros(1, 3, 2, 8), 2)[0].float(), torch.zeros(1, 3, 2, 8))


@pytest.mark.parametrize("backend", ["fp8_reference", "fp8_reference_rotated"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_is_that_of_e4m3(backend, head_dim):
    qkv = [heads(seed, head_dim=head_dim) for seed in range(3)]
    out = run(backend, *qkv)
    assert out.dtype == torch.bfloat16
    assert error(out, exact(*qkv)) < 0.06


def errors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[float]:
    """Without and with rotation."""
    expected = exact(query, key, value)
    return [error(run(name, query, key, value), expected) for name in ("fp8_reference", "fp8_reference_rotated")]


def test_the_rotation_helps_where_a_channel_is_large_in_queries_and_keys():
    query, key, value = (heads(seed) for seed in range(3))
    query[..., 9] *= 5
    key[..., 9] *= 5  # one product carries most of a score, and its rounding too
    plain, rotated = errors(query, key, value)
    assert rotated < 0.7 * plain


def test_the_rotation_harms_where_all_keys_share_a_large_number():
    query, key, value = (heads(seed) for seed in range(3))
    key[..., 9] += 64  # rounded alike in every key, it drops out of the softmax
    plain, rotated = errors(query, key, value)
    assert plain < rotated


def test_queries_may_share_heads_of_keys():
    query, key, value = heads(0, count=8), heads(1, count=2), heads(2, count=2, tokens=96)
    assert error(attend(query, key, value, 64**-0.5), exact(query, key, value)) < 0.05


def test_the_scale_of_the_softmax_is_kept():
    qkv = [heads(seed) for seed in range(3)]
    for backend in ("fp8_reference", "fp8_reference_rotated"):
        expected = exact(qkv[0] * 0.5, *qkv[1:])
        assert error(run(backend, *qkv, scale=0.5 * 64**-0.5), expected) < 0.05


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ({"is_causal": True}, "causal order"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"parallel_config": object()}, "context parallelism"),
    ],
)
def test_what_the_kernels_cannot_is_refused(option, found):
    with pytest.raises(KernelError, match=f"found {found}, expected none"):
        run("fp8_reference", heads(0), heads(1), heads(2), **option)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(96, 96, dtype=torch.bool).tril()[None, None], "an attention mask that shows different keys"),
        (torch.ones(2, 4, 96, 96, dtype=torch.bool), r"an attention mask of bool \[2, 4, 96, 96\]"),
        (torch.zeros(2, 1, 1, 96), r"an attention mask of float32 \[2, 1, 1, 96\]"),
    ],
    ids=["causal", "for each head", "added"],
)
def test_a_mask_that_hides_more_than_padding_is_refused(mask, found):
    with pytest.raises(KernelError, match=f"found {found}.*, expected .*; skip_layers"):
        run("fp8_reference", heads(0), heads(1), heads(2), attn_mask=mask)


@pytest.mark.parametrize("backend", ["fp8_reference", "fp8_reference_rotated"])
@pytest.mark.parametrize("kind", ["keys", "every query", "padded queries see nothing"])
def test_a_mask_hides_padding(backend, kind):
    """The hidden tokens are so large that a scale with them in it would lose all others."""
    query, key, value = (heads(seed) for seed in range(3))
    is_token = torch.arange(96) < torch.tensor([[96], [61]])
    for x in (key, value):
        x[1, 61:] *= 1e6
    masks = {
        "keys": is_token,
        "every query": is_token[:, None, None],
        "padded queries see nothing": is_token[:, None, None] & is_token[:, None, :, None],
    }
    out = run(backend, query, key, value, attn_mask=masks[kind])
    for item, count in enumerate((96, 61)):
        expected = exact(query[item : item + 1], key[item : item + 1, :count], value[item : item + 1, :count])
        seen = count if kind == "padded queries see nothing" else 96
        assert error(out[item : item + 1, :seen], expected[:, :seen]) < 0.06
        assert not out[item, seen:].any()


def test_a_mask_that_hides_every_key_gives_zeros():
    nothing = torch.zeros(2, 1, 1, 96, dtype=torch.bool)
    assert not run("fp8_reference", heads(0), heads(1), heads(2), attn_mask=nothing).any()


def test_a_device_without_a_kernel_hears_every_reason():
    with pytest.raises(KernelError, match=r"found cpu .*flash_3 needs .*sage needs .*; install") as raised:
        select_attention_kernel(None, CPU)
    assert "\n" not in str(raised.value)
    assert "flash_3_hub" not in str(raised.value), "nothing is downloaded unasked"
    with pytest.raises(KernelError, match="flash_3 needs"):
        select_attention_kernel("flash_3", CPU)


def test_an_unknown_backend_hears_which_there_are():
    with pytest.raises(KernelError, match="'flash', expected one of flash_3, sage, flash_3_hub, reference"):
        select_attention_kernel("flash", CPU)


def test_the_reference_runs_only_when_asked_for():
    assert select_attention_kernel("reference", CPU).name == "reference"


def flash_attn_func(q, k, v, softmax_scale, q_descale, k_descale, v_descale):
    """Stands in for FlashAttention-3: takes its arguments, and multiplies the codes as they are."""
    assert {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
    assert {x.shape for x in (q_descale, k_descale, v_descale)} == {(k.shape[0], k.shape[2])}
    query, key, value = (x.double() * d[:, None, :, None] for x, d in ((q, q_descale), (k, k_descale), (v, v_descale)))
    return exact(query * softmax_scale * q.shape[-1] ** 0.5, key, value).bfloat16(), None


def test_flash_attention_3_gets_codes_and_their_scales_compiled_or_not(monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    qkv = [heads(seed) for seed in range(3)]
    (kernel,) = (kernel for kernel in ATTENTION_KERNELS if kernel.name == "flash_3")
    out = kernel.run(*qkv, 64**-0.5)
    assert 0.01 < error(out, exact(*qkv)) < 0.06
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: kernel.run(*x, 64**-0.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*qkv), out)


def test_what_a_graph_is_told_of_the_output_holds_for_queries_that_are_views(monkeypatch):
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    codes, scales = zip(*(quantize_per_head(heads(seed), 4) for seed in range(3)), strict=True)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in codes]
    arguments = (*views, *scales, 0.125, False)
    torch.library.opcheck(torch.ops.omni_convert.fp8_flash_attention_3, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("backend", ["fp8_flash_3", "fp8_flash_3_hub", "fp8_sage"])
def test_a_backend_that_is_only_named_says_why_it_cannot_run(backend):
    with pytest.raises(KernelError, match=r"found cpu for \w+, which needs .*; choose another"):
        run(backend, heads(0), heads(1), heads(2))


def test_every_kernel_is_a_backend_of_diffusers():
    names = {f"fp8_{kernel.name}{suffix}" for kernel in ATTENTION_KERNELS for suffix in ("", "_rotated")}
    assert names <= {member.value for member in AttentionBackendName}
