"""Other papers' objectives in this training loop: another loss, another rejected image.

    python examples/variants.py chip --model M --data FILE      # all further flags are train.py's
    python examples/variants.py chip --resume RUN               # the same variant; another one is refused

    chip      CHiP, arXiv:2501.16629: one sigmoid for both preferences; m_l is m_w under noise
    opa-dpo   OPA-DPO, arXiv:2501.09695: CoPO counts 0.2; m_l is m_w without 30% of its patches
    rpo       DPO with a negative log-likelihood of y_w (SFT) in place of the conditional term and the anchor

Each changes what its paper changes in mDPO's loss and rejected image, and nothing else of that paper. To add one,
write a function with the results and arguments of `mdpo_loss`, and `batch`, for `train.main(argv, loss)`, or one like
`data.random_crop`, for `data.STRATEGIES`, and enter it at the end.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import STRATEGIES, BadInput, run_command
from mdpo import LogPs, mdpo_loss, rewards


def chip_loss(policy_logps, ref_logps, beta=0.1, **fixed):
    """CHiP's joint sigmoid: -log sigmoid[(r_w - r_l) + (r_w - r_img)].

    So the authors' code has it (`use_cross_modal_loss`), where token and segment weights come on top of it. mDPO's two
    terms stop pulling one by one; this one stops when the sum of the margins is large.
    """
    _, metrics = mdpo_loss(policy_logps, ref_logps, beta, conditional=False, anchors=())
    del metrics["loss/dpo"]
    r = rewards(policy_logps, ref_logps, beta, LogPs._fields, ())
    joint = -F.logsigmoid((r["chosen"] - r["rejected"]) + (r["chosen"] - r["image_rejected"]))
    return joint, {"loss/joint": joint.detach()} | metrics


def opa_dpo_loss(policy_logps, ref_logps, beta=0.1, delta=0.0, **fixed):
    """OPA-DPO's weights: DPO + 0.2 CoPO + AncPO.

    CoPO_coef 0.2 and Anchor_coef 1 are those of the authors' script. What OPA-DPO does before, fine-tuning on revised
    answers so that they are on-policy, and its second pair of answers are not part of this.
    """
    losses, metrics = mdpo_loss(policy_logps, ref_logps, beta, delta, conditional=False)  # DPO + AncPO
    r = rewards(policy_logps, ref_logps, beta, LogPs._fields, ())
    copo = -0.2 * F.logsigmoid(r["chosen"] - r["image_rejected"])
    return losses + copo, {"loss/conditional": copo.detach()} | metrics


def rpo_loss(policy_logps, ref_logps, beta=0.1, alpha=1.0, *, batch, **fixed):
    """DPO + alpha * NLL of y_w per token: -log sigmoid(r_w - r_l) - alpha * log pi(y_w | m_w, q) / |y_w|.

    The SFT term of RPO (arXiv:2405.16436) keeps the chosen answer likely, as mDPO's anchor does. alpha is TRL's
    `rpo_alpha`. batch: of `make_batch`, whose first rows are those of y_w.
    """
    dpo, metrics = mdpo_loss(policy_logps, ref_logps, beta, conditional=False, anchors=())
    n_tokens = (batch.labels >= 0).sum(1)[: len(dpo)].to(dpo.device, non_blocking=dpo.is_cuda)  # (B,)
    sft = -alpha * policy_logps[0] / n_tokens
    return dpo + sft, {"loss/sft": sft.detach()} | metrics


# a_t = (1 - b_0) ... (1 - b_t), where b_t rises from 1e-5 to 5e-3 as a sigmoid over -6 to 6: CHiP's code.
A = (1 - (1e-5 + (5e-3 - 1e-5) * torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid())).cumprod(0)


def diffusion_noise(image, rng, area=None, other=None, t=500):
    """noise of a diffusion's step 500 of 1000 (CHiP)"""
    # x_t = sqrt(a_t) x + sqrt(1 - a_t) e, for pixels x in -1..1 and normal e. CHiP does this to the model's
    # input. Here it is the picture, so that it is clipped to -1..1, and shrinking it averages noise out.
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    e = torch.randn(len(pixels), generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    x = A[t].sqrt().item() * (pixels / 127.5 - 1) + (1 - A[t]).sqrt().item() * e
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.frombytes("RGB", image.size, levels.numpy().tobytes())


def mask_patches(image, rng, area=None, other=None, share=0.3, grid=24):
    """30% of 24 x 24 patches in the image's mean grey (OPA-DPO)"""
    # 24 x 24 as in LLaVA-1.5. Of the authors' two masks this is "blockwise"; their script has single pixels.
    hidden = {*rng.sample(range(grid**2), round(share * grid**2))}
    mask = Image.frombytes("L", (grid, grid), bytes(255 * (patch in hidden) for patch in range(grid**2)))
    grey = Image.new("RGB", image.size, (round(sum(ImageStat.Stat(image).mean) / 3),) * 3)
    return Image.composite(grey, image, mask.resize(image.size, Image.Resampling.NEAREST))


STRATEGIES |= {"noise": diffusion_noise, "mask": mask_patches}  # also in a DataLoader worker that was not forked
VARIANTS = {  # name: (loss, flags that come before the user's)
    "chip": (chip_loss, ["--reject", "noise"]),
    "opa-dpo": (opa_dpo_loss, ["--reject", "mask"]),
    "rpo": (rpo_loss, ["--no-conditional", "--anchors", "none"]),
}
FIXED = {"--no-image", "--no-conditional", "--anchors", "--delta", "--demo"}  # would not do as they say


def run(argv):
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "All other arguments are those of train.py: python train.py --help"
    parser.add_argument("variant", choices=VARIANTS)
    name, given = parser.parse_args(argv[:1]).variant, argv[1:]
    loss, flags = VARIANTS[name]
    if refused := FIXED & {word.partition("=")[0] for word in given}:
        raise BadInput(f"{min(refused)}: {name} has terms of its own")
    resuming = any(word.startswith("--resume") for word in given)
    return train.main(given if resuming else [*flags, *given], loss)


if __name__ == "__main__":
    sys.exit(run_command(run))
