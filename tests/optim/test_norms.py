"""Norms agree with float64 where torch's own do not, and the trust ratio is defined for every pair of norms.

Guards against norms in the parameter's dtype (fp16 overflows), against long float32 sums (2e-3 wrong on a BERT
embedding), and against 0/0.
"""

import pytest
import torch
from optim_cases import FLOAT32_BACKENDS

from largebatch import LAMB
from largebatch.optim import norms


def whole(x: torch.Tensor, norm: str) -> float:
    pieces = norms.measure([x], norm)
    return float(norms.combine(norms.join(pieces, [0], norm), [()], norm)[0])


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_bert_embedding_agrees_with_float64(backend: str) -> None:
    # Its weights are drawn as BERT's, and scaled so that the exact norm is the float64 one. 1e-6 is the bar; a row of
    # 1,024 in float32 is good to 1e-7, and the rows' errors average out. torch's own norm is the companion.
    x = (0.02 * torch.randn(30522, 1024)).requires_grad_()
    exact = sum(float(part.double().square().sum()) for part in x.detach().split(1024)) ** 0.5
    x.grad = torch.ones(1).expand(30522, 1024)  # u = 1 everywhere but for ε: ‖u‖ = √n
    optimizer = LAMB([x], lr=0.0, eps=0.0, weight_decay=0.0, backend=backend)
    optimizer.step()
    assert float(optimizer.trust_ratios()[0]) == pytest.approx(exact / x.numel() ** 0.5, rel=1e-6)
    if torch.get_num_threads() == 1:
        assert float(x.detach().norm()) != pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("norm", list(norms.ORDERS))
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 5000])
def test_every_length_of_vector(count: int, norm: str) -> None:
    x = torch.randn(count, dtype=torch.float64)
    expected = float(torch.linalg.vector_norm(x, norms.ORDERS[norm])) if count else 0.0
    assert whole(x, norm) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("norm", list(norms.ORDERS))
def test_pieces_of_several_layers_join_by_owner(norm: str) -> None:
    tiles = [torch.randn(3000, dtype=torch.float64) for _ in range(3)]
    joined = norms.join(norms.measure(tiles, norm), [0, 0, 1], norm)
    together = norms.combine(joined, [(), ()], norm)
    for ours, x in zip(together, (torch.cat(tiles[:2]), tiles[2]), strict=True):
        assert float(ours) == pytest.approx(float(torch.linalg.vector_norm(x, norms.ORDERS[norm])), rel=1e-13)


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_every_layout(layout: str) -> None:
    x = torch.randn(6, 8, 10, 12, dtype=torch.float64)
    x = {
        "transposed": x.permute(3, 1, 0, 2),
        "strided": x[..., ::3],
        "channels_last": x.to(memory_format=torch.channels_last),
    }[layout]
    assert whole(x, "l2") == pytest.approx(float(x.square().sum().sqrt()), rel=1e-13)


def test_half_precision_does_not_overflow() -> None:
    # 512 x 512 elements of 3.0 have the norm 1536; their squares sum to 2.4e6, beyond float16's 65,504.
    assert whole(torch.full((512, 512), 3.0, dtype=torch.float16), "l2") == pytest.approx(1536)
    assert whole(torch.full((512, 512), 3.0, dtype=torch.bfloat16), "l2") == pytest.approx(1536)
    assert whole(torch.full((512, 512), 3.0, dtype=torch.float16), "l1") == pytest.approx(3 * 512 * 512)
    assert torch.isinf(torch.full((512, 512), 3.0, dtype=torch.float16).square().sum())  # what is guarded against


def test_the_range_of_float32() -> None:
    # As the docstring says: magnitudes to 1e19 and from 1e-19.
    assert whole(torch.full((4096,), 1e17), "l2") == pytest.approx(64e17, rel=1e-6)
    assert whole(torch.full((4096,), 1e-18), "l2") == pytest.approx(64e-18, rel=1e-5)


def test_the_ratio_of_every_pair_of_norms() -> None:
    zero, one, inf, nan = 0.0, 2.0, float("inf"), float("nan")
    x_norm = torch.tensor([one, zero, one, zero, one, inf, nan, one])
    u_norm = torch.tensor([4.0, one, zero, zero, inf, one, one, nan])
    expected = torch.tensor([0.5, 1.0, 1.0, 1.0, 0.0, inf, nan, nan])
    assert torch.equal(norms.trust_ratio(x_norm, u_norm, norms.Ratio()).nan_to_num(-1), expected.nan_to_num(-1))


def test_phi() -> None:
    z = torch.tensor([0.1, 1.0, 10.0])
    assert norms.phi_of(None, z) is z
    assert norms.phi_of((0.5, 2.0), z).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert norms.phi_of(torch.sqrt, z).tolist() == pytest.approx(z.sqrt().tolist())


def test_a_layer_of_zeros_has_the_ratio_1_whatever_phi_does_to_its_norm() -> None:
    for phi in (lambda z: z.clamp(1.0, 10.0), lambda z: z.clamp_(1.0, 10.0), (1.0, 10.0)):
        ratio = norms.trust_ratio(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 4.0]), norms.Ratio(phi))
        assert ratio.tolist() == [1.0, 0.5]


def test_groups_are_reckoned_each_with_its_own_ratio() -> None:
    lengths = []

    def phi(z: torch.Tensor) -> torch.Tensor:
        lengths.append(len(z))
        return z

    first, last = norms.Ratio(phi, coefficient=2.0), norms.Ratio(coefficient=5.0)
    seen = norms.trust_ratios(torch.ones(4), torch.ones(4), [first, first, None, last])
    assert seen.tolist() == [2.0, 2.0, 1.0, 5.0]
    assert lengths == [2]
