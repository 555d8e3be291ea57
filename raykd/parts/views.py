"""Views of images that are made: differentiable, so that what a teacher says of a view leads back to the image."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LEAST, RATIO = 0.25, 4 / 3  # share of the image's area, and of its sides to each other; as SimCLR and CMI have them, about


def local_view(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """A random part of each image, enlarged to its size and mirrored at even odds.

    The part has 0.25 to 1 of the area and sides whose ratio is 3/4 to 4/3, drawn evenly on a logarithmic scale, cut down where
    it is larger than the image; it lies anywhere inside. Values between pixels are bilinear.

    Args:
        images: Floats of any range; gradient flows back to them.
        generator: On the CPU; 5 numbers an image are drawn, whatever their device.

    Example:
        >>> local_view(torch.ones(1, 1, 4, 4), torch.Generator().manual_seed(0)).unique()
        tensor([1.])

    Note:
        On CUDA the backward adds up in no fixed order.
    """
    draws = torch.rand(len(images), 5, generator=generator, dtype=torch.float64)
    area, ratio = LEAST + (1 - LEAST) * draws[:, 0], RATIO ** (2 * draws[:, 1] - 1)
    height, width = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    down, across = (1 - height) * (2 * draws[:, 2] - 1), (1 - width) * (2 * draws[:, 3] - 1)
    mirror = torch.where(draws[:, 4] < 0.5, -1.0, 1.0)
    nothing = torch.zeros_like(area)
    rows = torch.stack([width * mirror, nothing, across]), torch.stack([nothing, height, down])
    corners = torch.stack(rows).permute(2, 0, 1).to(images)  # [b 2 3]: where each place of the view is in the image
    grid = F.affine_grid(corners, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
