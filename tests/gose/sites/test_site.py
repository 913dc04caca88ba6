from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from gose import preserve, sites
from gose.config import SitesConfig
from gose.data import Examples, Task
from gose.models import apply_chain, init_stage
from gose.sites import Site

_CONFIG = SitesConfig(steps=4, batch_size=8, rounds=1, lr=0.01, shared_lr_factor=0.25)


def _examples(num: int) -> Examples:
    generator = torch.Generator().manual_seed(num)
    return Examples(torch.rand(num, 9, generator=generator), torch.arange(num) % 3)


def _path():
    generator = torch.Generator().manual_seed(0)
    return [
        init_stage(4, 6, 1, generator=generator, num_inputs=9),
        init_stage(4, 6, 1, generator=generator, num_classes=3),
    ]


def _site() -> Site:
    return Site(0, _examples(30), _examples(6))


def _learn(path, frozen, config=_CONFIG):
    generator = torch.Generator().manual_seed(5)
    return sites.learn(_site(), path, frozen, config, num_classes=3, generator=generator)


def test_local_steps_are_adamw_on_prior_corrected_logits():
    path, site = _path(), _site()
    learned = _learn(path, [preserve.nothing_frozen(p) for p in path])
    leaves = [{k: v.clone().requires_grad_() for k, v in p.items()} for p in path]
    adamw = torch.optim.AdamW(
        [
            {"params": list(leaves[0].values()), "lr": 0.0025},
            {"params": list(leaves[1].values()), "lr": 0.01},
        ],
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )
    count = torch.bincount(site.train.label_B, minlength=3) + 1.0
    prior = (count / count.sum()).log()
    for index in torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(5)):
        logits = apply_chain(leaves, site.train.x_BD[index]) + prior
        adamw.zero_grad()
        cross_entropy(logits, site.train.label_B[index]).backward()
        adamw.step()
    for got, wanted in zip(learned.stages, leaves, strict=True):
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name].detach(), rtol=1e-4, atol=1e-6)


def test_learning_leaves_its_inputs_and_frozen_elements_alone():
    path = _path()
    before = [{k: v.clone() for k, v in p.items()} for p in path]
    generator = torch.Generator().manual_seed(1)
    frozen = [
        {k: torch.rand(v.shape, generator=generator) < 0.6 for k, v in path[0].items()},
        preserve.nothing_frozen(path[1]),
    ]
    learned = _learn(path, frozen, _CONFIG.model_copy(update={"steps": 20}))
    for old, now, new, masks in zip(before, path, learned.stages, frozen, strict=True):
        for name, mask in masks.items():
            assert torch.equal(now[name], old[name])
            assert torch.equal(new[name][mask], old[name][mask])
            assert mask.all() or (new[name][~mask] != old[name][~mask]).any()


def test_sites_hold_every_training_image_once_and_validation_evenly():
    task = Task("t", (0, 1, 2), _examples(300), _examples(31), _examples(3))
    config = _CONFIG.model_copy(update={"dirichlet_alpha": 0.3})
    divided = sites.divide(task, config, generator=torch.Generator().manual_seed(0))
    assert sum(len(s.train.label_B) for s in divided) == 300
    rows = torch.cat([s.train.x_BD for s in divided])
    assert torch.equal(rows.sum(1).sort().values, task.train.x_BD.sum(1).sort().values)
    assert sorted(len(s.validation.label_B) for s in divided) == [10, 10, 11]
    shares = torch.stack([torch.bincount(s.train.label_B, minlength=3) for s in divided]) / 100
    assert float(shares.max()) > 0.6, "classes are skewed"
    assert min(len(s.train.label_B) for s in divided) >= 8


def test_local_fisher_looks_at_no_more_images_than_asked():
    path, site = _path(), _site()
    found = sites.local_fisher(site, path, images=10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(30, generator=generator)[:10]
    truth = preserve.fisher(path, site.train.x_BD[order], generator=generator)
    assert torch.equal(found[1]["head.weight"], truth[1]["head.weight"])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_prior_correction_lets_a_skewed_site_keep_its_rare_classes(weight):
    """A site that sees 90 % of one class: without correction its logits lean that way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 9, generator=generator)
    label = (torch.arange(200) >= 180).long()
    site = Site(0, Examples(x, label), Examples(x, label))
    path = _path()
    config = _CONFIG.model_copy(update={"steps": 60, "prior_weight": weight})
    learned = sites.learn(
        site,
        path,
        [preserve.nothing_frozen(p) for p in path],
        config,
        num_classes=3,
        generator=generator,
    )
    logits = apply_chain(learned.stages, x).mean(0)
    lean = float(logits[0] - logits[1])
    assert lean < 1.0 if weight else lean > 1.3
