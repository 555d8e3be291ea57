"""TSC-GAN: an AC-GAN learns the training images; the student imitates the teacher on some of these and on what it makes."""

from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.critics import Critic
from raykd.parts.inversion import softened
from raykd.parts.numeric import full

NAME = "GAN-assisted teacher-student compression"
PAPER = "Liu, Fusi, Mackey: Teacher-Student Compression with Generative Adversarial Networks. arXiv:1812.02271 (2018)"
SECTION = "3.5"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "conditional",
    "options": {"join": "onehot", "upsample": "transposed", "last": "tanh", "init": "normal"},
    "latent": 100,
    "real": 0.2,
    "before": 50000,
    "generator_steps": 0,
    "student_steps": 1,
    "lr": 2e-4,
    "betas": (0.5, 0.999),
}


def tsc_gan_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    form: str = "kl",
    temperature: float = 4.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises what the student says otherwise than the teacher, on training images and on those that the generator makes.

    kl: temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))
    logits: 1/2 * sum over classes of (teacher_logits - student_logits)^2

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        form: `kl`, or `logits`, as the authors' code for CIFAR-10 has it.
        temperature: Of `kl`, softens both distributions, above 0; 4 is ours.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes of the images read and those wanted of the images made; 0.

    Returns:
        Per sample, in nats times temperature^2, or in squared class scores.

    Raises:
        SignalError: The shapes differ.
        ConfigError: The form is unknown.

    Example:
        >>> import torch
        >>> tsc_gan_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])
        >>> tsc_gan_loss(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]), form="logits")
        tensor([5.])

    References:
        arXiv:1812.02271

    Note:
        Written from the abstract, accounts of others and what the authors' code sets; the paper's text was not at hand. Of
        each batch here the share `synthesis.real`, 0.2, is read; there a whole batch is made with probability p_fake, 0.8 in
        the example of that code, and otherwise read. That the student hears no labels is the code's.
    """
    check_choice("tsc-gan", form=form, known=("kl", "logits"))
    if form == "kl":
        return softened("tsc-gan", student_logits, teacher_logits, temperature)
    check_axes("tsc-gan", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    return (full(teacher_logits) - full(student_logits)).square().sum(1) / 2


def images_loss(
    score: Float[Tensor, "b"],
    class_scores: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    *,
    gan: str = "non_saturating",
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises images that the critic tells from training images, or in which it does not see the class wanted.

    source: -log sigmoid(score), or as `gan` says
    classes: -log softmax(class_scores)[labels]

    Args:
        score: What the critic says of the images' source: the higher, the more like training images.
        class_scores: What it says of their class.
        labels: The classes wanted.
        gan: Form of the game: saturating, log(1 - sigmoid(score)), is AC-GAN's equation, by which the generator minimises
            what the critic maximises; non_saturating has the same critic and a gradient that lasts while the critic wins;
            least_squares is (1 - score)^2.

    Returns:
        Terms source, in nats or without unit, and classes, in nats, per sample; the saturating form is below 0.

    Raises:
        SignalError: The shapes do not fit together.
        ConfigError: No such form.

    Example:
        >>> import torch
        >>> images_loss(torch.zeros(1), torch.zeros(1, 10), torch.tensor([3]))
        {'source': tensor([0.6931]), 'classes': tensor([2.3026])}

    References:
        Odena et al.: Conditional Image Synthesis with Auxiliary Classifier GANs. ICML 2017, arXiv:1610.09585, equations 2, 3:
        the generator maximises L_C - L_S.

    Note:
        Rate, decays, noise and number of steps (`SYNTHESIS`) are AC-GAN's for CIFAR-10, as far as we know them; the
        generator is this project's DCGAN with the class appended to the noise.
    """
    check_axes("tsc-gan", score=(score, "b"), class_scores=(class_scores, "b c"), labels=(labels, "b"))
    wrong = F.cross_entropy(full(class_scores), labels, reduction="none")
    return {"source": passing(score, gan), "classes": wrong}


def _judge(images: tuple[int, ...], num_classes: int, width: int, dropout: float) -> nn.Sequential:
    """Six convolutions 3x3, every other of stride 2, each with LeakyReLU(0.2) and dropout, and a linear layer to all scores."""
    channels, rows, columns = images
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise([channels, *(width << i for i in range(6))])):
        stride = 2 - number % 2
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
        rows, columns = -(-rows // stride), -(-columns // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 32 * rows * columns, 1 + num_classes))


class Images(nn.Module):
    """The critic of an AC-GAN: of each image a score of its source and one of each class; it learns before each generator's
    step, see `critics`.

    Args:
        images: (c, h, w).
        num_classes: Of the labels.
        gan: As in the loss.
        width: Channels of the first convolution, doubled by each further one; 16.
        dropout: Share of what each convolution yields that is zeroed, 0 to below 1; 0.5.
        critic_lr: Rate of the critic's Adam, whose decays are 0.5 and 0.999; 2e-4.

    Raises:
        ConfigError: A width or a dropout out of range.

    Note:
        As AC-GAN's for CIFAR-10, as far as we know it, without its batch norms and with torch's initial weights.
    """

    def __init__(
        self,
        images: tuple[int, ...],
        num_classes: int,
        *,
        gan: str,
        width: int = 16,
        dropout: float = 0.5,
        critic_lr: float = 2e-4,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"width: expected at least 1 channel, got {width} (tsc-gan). Raise it.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 to below 1, got {dropout} (tsc-gan). It is the share that is zeroed.")
        self.gan = gan
        self.critic = Critic(_judge(images, num_classes, width, dropout), lr=critic_lr, betas=(0.5, 0.999))

    def forward(self, images: Float[Tensor, "b _k _h _w"], labels: Int[Tensor, "b"]) -> dict[str, Float[Tensor, "b"]]:
        """The terms of images_loss, under the critic as it is."""
        return images_loss(*self.judged(images), labels, gan=self.gan)

    def judged(self, images: Float[Tensor, "b _k _h _w"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b c"]]:
        """The critic's score of each image's source, and of its classes. It sees values from -1 to 1."""
        scores = self.critic(2 * images - 1)
        return scores[:, 0], scores[:, 1:]


def critics(
    module: Images,
    images: Float[Tensor, "b _k _h _w"],
    labels: Int[Tensor, "b"],
    real_images: Float[Tensor, "b _k _h _w"],
    real_labels: Int[Tensor, "b"],
) -> dict[str, Float[Tensor, "b"]]:
    """What the critic minimises, -L_S - L_C of AC-GAN, for each training image and the made one beside it."""
    made, made_classes = module.judged(images)
    real, real_classes = module.judged(real_images)
    classes = F.cross_entropy(real_classes, real_labels, reduction="none")
    classes = classes + F.cross_entropy(made_classes, labels, reduction="none")
    return {"critic": telling_apart(real, made, module.gan) + classes}
