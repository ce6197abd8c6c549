import pytest
import torch

from synco_fast.generated.discriminator import (
    Discriminator,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from synco_fast.generated.generator import Generator, average_momentum, stage_channels
from synco_fast.models.ema import ema_update, make_ema_copy
from synco_fast.runtime.errors import ConfigError


@pytest.mark.parametrize("size", [32, 64])
def test_shapes_and_ranges(size):
    torch.manual_seed(0)
    images = Generator(size, latent=8, width=4)(torch.randn(3, 8))
    assert images.shape == (3, 3, size, size)
    assert ((images > 0) & (images < 1)).all()
    assert not torch.allclose(images[0], images[1]), "latents must matter"
    assert Discriminator(size, width=4)(images).shape == (3,)


def test_channels_halve_with_every_doubling():
    assert stage_channels(32, 32) == [256, 128, 64, 32]
    assert stage_channels(64, 64) == [512, 512, 256, 128, 64]


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_another_size_is_refused(network):
    with pytest.raises(ConfigError, match="size: found 48, expected 32 or 64"):
        network(48)


def test_no_sample_depends_on_the_others():
    torch.manual_seed(0)
    generator, discriminator = Generator(latent=8, width=4), Discriminator(width=4)
    latents = torch.randn(4, 8)
    together = generator(latents)
    assert torch.allclose(together[:2], generator(latents[:2]), atol=1e-5)
    assert torch.allclose(discriminator(together)[:2], discriminator(together[:2]), atol=1e-5)


def test_the_losses_have_their_signs():
    low, high = torch.tensor([-2.0]), torch.tensor([2.0])
    assert discriminator_loss(high, low) < discriminator_loss(low, high)
    assert generator_loss(high) < generator_loss(low)
    zero = torch.zeros(1)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * 0.693147, abs=1e-5)


def test_the_penalty_is_half_the_squared_gradient():
    images = torch.rand(5, 3, 4, 4, requires_grad=True)
    weight = torch.randn(48, requires_grad=True)
    penalty = gradient_penalty(images.flatten(1) @ weight, images)
    assert torch.allclose(penalty, weight.square().sum() / 2)
    penalty.backward()
    assert torch.allclose(weight.grad, weight.detach(), atol=1e-5), "it can be differentiated once more"


def test_the_average_follows_fast_at_first():
    assert average_momentum(0, 0.999) == 0.1
    assert average_momentum(10**6, 0.999) == 0.999
    torch.manual_seed(0)
    generator = Generator(latent=8, width=4)
    average = make_ema_copy(generator)
    with torch.no_grad():
        generator.enter.bias += 1
    ema_update(average, generator, average_momentum(0, 0.999))
    assert torch.allclose(average.enter.bias, generator.enter.bias - 0.1, atol=1e-6)
    assert all(not parameter.requires_grad for parameter in average.parameters())


def test_generator_and_discriminator_learn_one_colour():
    """A few adversarial steps bring the generator from gray to the one colour that is real."""
    torch.manual_seed(0)
    generator, discriminator = Generator(latent=4, width=4), Discriminator(width=4)
    optimizers = [torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.0, 0.99)) for net in (generator, discriminator)]
    real = torch.tensor([0.9, 0.1, 0.2]).view(1, 3, 1, 1).expand(8, 3, 32, 32)
    for _ in range(40):
        optimizers[1].zero_grad()
        discriminator_loss(discriminator(real), discriminator(generator(torch.randn(8, 4)).detach())).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        generator_loss(discriminator(generator(torch.randn(8, 4)))).backward()
        optimizers[0].step()
    mean = generator(torch.randn(8, 4)).mean(dim=(0, 2, 3))
    assert mean[0] > mean[2] + 0.2
    assert mean[0] > mean[1] + 0.2
