"""The entropy-guided router (EGS): which experts of a graph answer an input, and the answer.

T inputs, E experts, K experts per input, N = T * K rows, Q tasks, C classes, D width, Z features.

What sites know about tasks, all of it sums over images, so that sites merge it by adding:

    wins[e, q] = sum over validation images of task q of softmax_e(-NLL_e / win_temperature)
    count[q], sum[q, :], outer[q, :, :] of the features z(x) of the training images of task q

    C[e, q]    = wins[e, q] / sum_e wins[e, q]                  P(expert e is best | task q)
    p[q | e]   = (C[e, q] + a) / sum_q (C[e, q] + a), a = 0.01 / Q      uniform task prior
    H[e]       = entropy of p[. | e] / log Q in [0, 1];  0 for Q = 1
    P(q | x)   = softmax_q log N(z(x); mean[q], covariance[q])  quadratic discriminant, no training

method      entropy given to gk.route (egs: the K smallest)      weights            runs
static      H[e], the same for every input                       1 / (H + floor)    K experts
posterior   h[e] = -log(sum_q P(q | x) C[e, q]) / log E          softmax(-h / tau)  K experts
sample      entropy of expert e's own prediction for x           1 / (H + floor)    all E
uniform     none: K different experts drawn at random            1 / K              K experts
all         none                                                 1 / E              all E

`static` is the literal form of the method; `posterior` lets entropy's sibling, the surprise that
expert e should be the best one for x, choose before any expert has run. Experts average
probabilities, not logits, so that experts of different scale can be mixed.
z(x) is the image averaged to 7 x 7: it needs no module, so later learning cannot make it stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, relu

import gose_kernels as gk
from gose.config import RouteConfig
from gose.data import Examples
from gose.graph import ExpertGraph
from gose.models.stage import normalized

FEATURE_SIDE = 7
NUM_FEATURES = FEATURE_SIDE**2
# Log-probability below which an expert is simply wrong: soft wins of hopeless experts stay equal.
_WORST_LOG_P = -14.0


class Knowledge(NamedTuple):
    """What a group of sites knows about its tasks: sums over images, float64."""

    wins_EQ: Tensor
    count_Q: Tensor
    sum_QZ: Tensor
    outer_QZZ: Tensor


def no_knowledge() -> Knowledge:
    """The sums before the first task."""
    empty = torch.zeros(0, dtype=torch.float64)
    Z = NUM_FEATURES
    return Knowledge(empty.view(0, 0), empty, empty.view(0, Z), empty.view(0, Z, Z))


def features(x_TD: Tensor) -> Tensor:
    """z(x): square images averaged to 7 x 7, float64."""
    side = math.isqrt(x_TD.shape[1])
    image = x_TD.view(-1, 1, side, side)
    return adaptive_avg_pool2d(image, FEATURE_SIDE).flatten(1).double()


def feature_sums(x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of outer products of the features: what a site tells of its images."""
    z_TZ = features(x_TD)
    return torch.tensor(len(z_TZ), dtype=torch.float64), z_TZ.sum(0), z_TZ.T @ z_TZ


def with_task(knowledge: Knowledge, sums: Sequence[tuple[Tensor, ...]]) -> Knowledge:
    """The knowledge with one more task, from the feature sums of its sites."""
    count, total, outer = (
        torch.stack(parts).sum(0, keepdim=True) for parts in zip(*sums, strict=True)
    )
    return knowledge._replace(
        count_Q=torch.cat([knowledge.count_Q, count]),
        sum_QZ=torch.cat([knowledge.sum_QZ, total]),
        outer_QZZ=torch.cat([knowledge.outer_QZZ, outer]),
    )


def soft_wins(graph: ExpertGraph, examples: Examples, temperature: float) -> Tensor:
    """wins[e] = sum over images of softmax_e(-NLL_e / temperature), float64, shape [E].

    temperature -> 0 counts the images on which e is best; experts that tie share.
    """
    logits_TEC = all_logits(graph, examples.x_BD)
    log_p_TE = logits_TEC.log_softmax(-1)[torch.arange(len(logits_TEC)), :, examples.label_B]
    share_TE = (log_p_TE.clamp_min(_WORST_LOG_P) / temperature).softmax(-1)
    return share_TE.sum(0, dtype=torch.float64)


def best_given_task(wins_EQ: Tensor) -> Tensor:
    """C[e, q] = P(expert e is best | task q): columns sum to 1; a task nobody saw is uniform."""
    total_Q = wins_EQ.sum(0)
    uniform = torch.full_like(wins_EQ, 1 / wins_EQ.shape[0])
    return torch.where(total_Q > 0, wins_EQ / total_Q, uniform)


def task_given_best(best_EQ: Tensor) -> Tensor:
    """p[q | e] = P(task q | expert e is best) under a uniform task prior: rows sum to 1."""
    smoothed_EQ = best_EQ + 0.01 / best_EQ.shape[1]
    return smoothed_EQ / smoothed_EQ.sum(1, keepdim=True)


def module_entropy(wins_EQ: Tensor) -> Tensor:
    """H[e] in [0, 1], float32: 0 for an expert that wins one task only, and for Q = 1."""
    entropy_E: Tensor = gk.entropy(task_given_best(best_given_task(wins_EQ)).log().float())
    return entropy_E


class TaskHead(NamedTuple):
    """Gaussians of the tasks' features: log p(q | x) up to a constant of x."""

    mean_QZ: Tensor
    whitening_QZZ: Tensor  # inverse of the covariance's Cholesky factor
    log_volume_Q: Tensor


def task_head(knowledge: Knowledge) -> TaskHead:
    """The quadratic discriminant of the sums; covariances get 2 % of their mean variance + 1e-4.

    The ridge keeps pixels that are constant in a task from deciding alone.
    """
    count = knowledge.count_Q[:, None]
    mean_QZ = knowledge.sum_QZ / count
    covariance_QZZ = knowledge.outer_QZZ / count[..., None]
    covariance_QZZ = covariance_QZZ - mean_QZ[:, :, None] * mean_QZ[:, None, :]
    variance_Q = covariance_QZZ.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(mean_QZ.shape[1], dtype=mean_QZ.dtype)
    covariance_QZZ = covariance_QZZ + (0.02 * variance_Q + 1e-4)[:, None, None] * eye
    factor_QZZ = torch.linalg.cholesky(covariance_QZZ)
    whitening_QZZ = torch.linalg.solve_triangular(
        factor_QZZ, eye.expand_as(factor_QZZ), upper=False
    )
    log_volume_Q = factor_QZZ.diagonal(dim1=1, dim2=2).log().sum(1)
    return TaskHead(mean_QZ.float(), whitening_QZZ.float(), log_volume_Q.float())


def log_posterior(head: TaskHead, x_TD: Tensor) -> Tensor:
    """log P(q | x) [T, Q] under a uniform prior of the tasks known so far."""
    centred_QTZ = features(x_TD).float() - head.mean_QZ[:, None, :]
    white_QTZ = centred_QTZ @ head.whitening_QZZ.transpose(1, 2)
    log_density_QT = -0.5 * white_QTZ.square().sum(-1) - head.log_volume_Q[:, None]
    return log_density_QT.T.log_softmax(-1)


class Prediction(NamedTuple):
    """Class probabilities of the mixture, the experts that answered, and the work per input."""

    prob_TC: Tensor
    expert_TK: Tensor
    flops_per_input: float  # matrix products executed, router included


def predict(
    graph: ExpertGraph,
    knowledge: Knowledge,
    x_TD: Tensor,
    config: RouteConfig,
    *,
    generator: torch.Generator,
) -> Prediction:
    """The answer of the experts that `config.method` wakes for each input.

    generator: used by "uniform" only.
    """
    T, E = len(x_TD), len(graph.experts)
    K = min(config.top_k, E)
    router_flops = 0
    with torch.no_grad():
        stack = stack_experts(graph)
        h_TD = graph.hidden(x_TD)
        match config.method:
            case "posterior":
                h_TE, router_flops = surprise(knowledge, x_TD)
                weight_TK, expert_TK = _surest(K, h_TE, tau=config.tau)
            case "static":
                entropy_TE = module_entropy(knowledge.wins_EQ).expand(T, E)
                weight_TK, expert_TK = _surest(K, entropy_TE, floor=config.entropy_floor)
            case "uniform":
                drawn_TE = torch.rand(T, E, generator=generator).argsort(1)
                weight_TK, expert_TK = torch.full((T, K), 1 / K), drawn_TE[:, :K].int()
            case "all" | "sample":
                weight_TK, expert_TK = torch.full((T, E), 1 / E), _everyone(T, E)
        logits_NC, row_TK = run_experts(stack, h_TD, expert_TK)
        num_run = int((expert_TK < E).sum())
        if config.method == "sample":
            entropy_TE = gk.entropy(logits_NC[row_TK.long()])
            weight_TK, expert_TK = _surest(K, entropy_TE, floor=config.entropy_floor)
            row_TK = row_TK.gather(1, expert_TK.long())
        prob_TC: Tensor = gk.combine(logits_NC.softmax(-1), weight_TK, row_TK)
    trunk_macs, expert_macs = graph.macs()
    flops = 2 * (trunk_macs + expert_macs * num_run / T) + router_flops
    return Prediction(prob_TC, expert_TK, flops)


def _surest(
    top_k: int, entropy_TE: Tensor, *, floor: float = 0.05, tau: float | None = None
) -> tuple[Tensor, Tensor]:
    """weight_TK and expert_TK of the K smallest entropies: weights 1 / (H + floor), or by tau."""
    weight_TK, expert_TK, *_ = gk.route(
        torch.zeros_like(entropy_TE),
        top_k,
        entropy_TE,
        policy="egs",
        entropy_floor=floor,
        tau=tau,
    )
    return weight_TK, expert_TK


def _everyone(T: int, E: int) -> Tensor:
    return torch.arange(E, dtype=torch.int32).expand(T, E).contiguous()


def surprise(knowledge: Knowledge, x_TD: Tensor) -> tuple[Tensor, int]:
    """h[t, e] = -log P(expert e is best | x) / log E >= 0 [T, E]; and the FLOPs per input.

    0 for a certain choice; 1 where e is as likely as in a uniform draw.
    """
    best_EQ = best_given_task(knowledge.wins_EQ).float()
    E, Q = best_EQ.shape
    log_p_TQ = log_posterior(task_head(knowledge), x_TD)
    best_TE = log_p_TQ.exp() @ best_EQ.T
    h_TE = -best_TE.clamp(1e-12, 1.0).log() / math.log(max(E, 2))
    return h_TE, 2 * Q * (NUM_FEATURES**2 + E)


def stack_experts(graph: ExpertGraph) -> dict[str, Tensor]:
    """The experts' tensors by name, expert id first: weights [E, F, D], biases [E, F].

    All experts must have the same names and shapes; raises ValueError otherwise.
    """
    experts = [graph.nodes[name] for name in graph.experts]
    if not experts:
        raise ValueError("router.stack_experts: the graph has no expert")
    shapes = [{key: tuple(tensor.shape) for key, tensor in params.items()} for params in experts]
    for name, came in zip(graph.experts, shapes, strict=True):
        if came != shapes[0]:
            raise ValueError(
                f"router.stack_experts: expert {name!r} must have the tensors of "
                f"{graph.experts[0]!r} {shapes[0]}, got {came}"
            )
    return {key: torch.stack([params[key] for params in experts]) for key in experts[0]}


def run_experts(
    stack: Mapping[str, Tensor], h_TD: Tensor, expert_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of every chosen (input, expert) pair in dispatch order, and row_TK into them."""
    num_experts = len(next(iter(stack.values())))
    row_TK, token_N, offset_E1 = gk.dispatch(expert_TK, num_experts=num_experts)

    def layer(name: str, x_ND: Tensor) -> Tensor:
        y_NF: Tensor = gk.grouped_gemm(
            x_ND, stack[f"{name}.weight"], offset_E1, stack[f"{name}.bias"]
        )
        return y_NF

    x_ND = h_TD[token_N.clamp_min(0).long()]
    if "pre.weight" in stack:
        x_ND = layer("pre", x_ND)
    block = 0
    while f"{block}.up.weight" in stack:
        x_ND = x_ND + layer(f"{block}.down", relu(layer(f"{block}.up", normalized(x_ND))))
        block += 1
    return layer("head", normalized(x_ND)), row_TK


def all_logits(graph: ExpertGraph, x_TD: Tensor) -> Tensor:
    """Logits of every expert for every input, [T, E, C]."""
    with torch.no_grad():
        expert_TE = _everyone(len(x_TD), len(graph.experts))
        logits_NC, row_TE = run_experts(stack_experts(graph), graph.hidden(x_TD), expert_TE)
        return logits_NC[row_TE.long()]
