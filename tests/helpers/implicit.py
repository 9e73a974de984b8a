"""Small schedules, images and networks of the implicit upsampler."""

import torch
import torch.nn.functional as F

from pipeline.upsamplers.implicit.network import ImplicitNetworks
from pipeline.upsamplers.implicit.schedule import Schedule

SHORT = Schedule(
    views=12, held_out=3, steps=12, views_per_step=3, check_every=4, cell_px=9, max_pad_px=6, learning_rate=0.01
)
SIZE, GRID, STRIDE = (40, 48), (4, 5), 10


def random_images(N=1, size=SIZE):
    return F.interpolate(torch.randint(0, 256, (N, 3, 7, 5)).float(), size).to(torch.uint8)


def random_targets(schedule, N=1, k=4):
    """Of views that all show the same, of one colour: what a network learns in a few steps."""
    own = torch.randn(N, 1, k, 1, 1).expand(-1, -1, -1, *GRID)
    return own.expand(-1, schedule.views, -1, -1, -1), own.expand(-1, schedule.held_out, -1, -1, -1)


def random_networks(N=2, k=4, size=SIZE):
    networks, images = ImplicitNetworks(N, k), random_images(N, size)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    networks.look_at(images)
    return networks, images
