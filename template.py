"""Class-incremental learning (CIL) in one file: WA, "Maintaining Discrimination and Fairness in
Class Incremental Learning" (Zhao et al., CVPR 2020, arXiv 1911.07053).

    python template.py                                    # digits, one process, about a minute
    torchrun --nproc_per_node=2 template.py               # the same on two processes or GPUs
    torchrun --nproc_per_node=4 template.py --data_set cifar100 --data_path DIR --amp bf16
"""
# The idea. Classes arrive in tasks. After each task the model is tested on all classes so far,
# but of the old classes only a few images, the exemplars, may be kept. A network that is just
# trained further forgets the old classes at once. WA does three things against that:
#   1. it replays exemplars, chosen by herding              (herding, update_memory)
#   2. it distils the old model's answers into the new one  (compute_loss)
#   3. it aligns the classifier's weights after training    (finish_task)
# Read `main` at the bottom first: it is the whole run. The steps that it calls are methods of
# CilTrainer, in the order of their use; CilModel above it is the network that grows.
# To try an idea of your own, copy this file and edit it, or subclass CilTrainer, override one of
# its steps and call main(args, MyTrainer). Flags, data, processes and files are in utils.py.
import torch
import torch.nn.functional as F
from torch import nn

import utils


class CilClassifier(nn.Module):
    """One linear head per task: features (batch, embed_dim) -> logits (batch, classes so far)."""

    def __init__(self, embed_dim):
        super().__init__()
        self.embed_dim = embed_dim
        # Side by side the heads are one linear layer that grows. Row w_c of its weights is called
        # the prototype of class c; the logit of c is <w_c, phi(x)> + b_c.
        self.heads = nn.ModuleList()

    def expand(self, nb_classes):
        """Add a head for nb_classes new classes; the old logits stay as they are."""
        self.heads.append(nn.Linear(self.embed_dim, nb_classes))
        # Prototypes of length about 1, no bias (torch's default: length 0.58, random biases).
        # On every rank the same numbers are drawn here.
        nn.init.kaiming_uniform_(self.heads[-1].weight, nonlinearity="linear")
        nn.init.zeros_(self.heads[-1].bias)

    def forward(self, features):
        # Heads in the order of the tasks: column c belongs to the class with label c.
        return torch.cat([head(features) for head in self.heads], dim=1)


class CilModel(nn.Module):
    """A backbone phi, which is any module with `num_features`, and a `CilClassifier`."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.fc = backbone, CilClassifier(backbone.num_features)

    def forward(self, images):
        features = self.backbone(images)  # (batch, embed_dim)
        return self.fc(features), features  # logits: (batch, known + new), old and new classes

    def align_weights(self, nb_new):
        """Scale the newest prototypes by gamma = mean |w_old| / mean |w_new|, and return gamma."""
        # New classes had many more images. So their prototypes tend to be longer, and with them
        # their logits: old images are taken for new classes. One common factor takes that advantage
        # away and leaves the new classes as they are among themselves.
        norms = torch.cat([head.weight.data for head in self.fc.heads]).norm(dim=1)  # (classes,)
        gamma = float(norms[:-nb_new].mean() / norms[-nb_new:].mean())
        # Biases stay as they are: the argument is about |w|. The paper also clips w at 0 after
        # every step; on digits that did great harm (chapter 8).
        self.fc.heads[-1].weight.data *= gamma
        return gamma


def herding(features, m):
    """The choice of exemplars (Algorithm 4 of Rebuffi et al., CVPR 2017, arXiv 1611.07725).

    features: (n, embed_dim), of one class. Returns min(m, n) row numbers, the most important
    first, so that a smaller memory is the beginning of a larger one."""
    # Greedy: the next exemplar brings the mean of the chosen ones closest to the class mean.
    features, chosen = F.normalize(features.double(), dim=1), []
    for k in range(1, min(m, len(features)) + 1):
        # (n,), k times the distance between the two means, if the image were chosen
        distance = (k * features.mean(0) - features[chosen].sum(0) - features).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
    return chosen


def knowledge_distillation(logits, teacher_logits, temperature):
    """KL divergence of the softened student from the softened teacher, over the classes that the
    teacher knows; batch mean. logits: (batch, known + new), teacher_logits: (batch, known)."""
    # The paper's cross-entropy minus a constant: same gradient, and 0 where both agree.
    return F.kl_div(F.log_softmax(logits[:, :teacher_logits.shape[1]] / temperature, dim=1),
                    F.softmax(teacher_logits / temperature, dim=1), reduction="batchmean")


class CilTrainer:
    """WA. Every method below, but `fit`, is one step that another idea may override."""

    model_class = CilModel

    def __init__(self, args):
        self.args = args
        self.model = self.model_class(utils.create_backbone(args))
        # teacher: the frozen model of the task before. exemplars: an ImageSet for each known class,
        # most important image first. known_classes: without this task's. resting: see utils.frozen.
        # `main` adds run (files), task (its number), nb_new (its classes), stage (its fits so far).
        self.teacher, self.exemplars, self.known_classes, self.resting = None, [], 0, []

    def expand_model(self, nb_new, new_data):
        """Make room for nb_new classes. new_data: their images, for a clever start (unused)."""
        self.model.fc.expand(nb_new)
        self.model.to(self.args.device)  # the new head was made on the CPU

    def train_task(self, train_set):
        """Learn a task from its images and the exemplars of all tasks before."""
        # Everything learns, old heads and backbone too: what holds them is replay and KD.
        self.fit(train_set, self.model.parameters(), self.args.num_epochs, self.args.lr)

    def fit(self, train_set, parameters, num_epochs, lr):
        """Train these parameters on this set. A task may call fit more than once."""
        loader = self.make_loader(train_set)
        optimizer, scheduler = self.make_optimizer(parameters, num_epochs, lr)
        # Every rank holds the whole model. DDP averages the gradients during backward, so all
        # ranks take the same step. `self.model` is the same network without that wrapper.
        self.parallel_model = utils.distribute(self.model, self.args)
        # A resumed run goes on after its last checkpoint, as if nothing had happened, since all
        # that is random in an epoch follows from (seed, task, stage, epoch).
        self.epoch = self.run.restore_fit(self, optimizer, scheduler, num_epochs)
        # (A schedule may end the fit early, by a rate of 0.)
        while self.epoch < num_epochs and (self.epoch == 0 or max(scheduler.get_last_lr()) > 0):
            loader.sampler.seed = utils.seed_epoch(self)
            averages = self.train_epoch(loader, optimizer)
            scheduler.step()
            self.epoch += 1
            # BatchNorm's running averages become equal on all ranks; rank 0 logs, and may save.
            self.run.end_epoch(self, averages, optimizer, scheduler)
        self.stage += 1

    def make_loader(self, train_set):
        """Shuffled and augmented batches, of which each rank gets its share."""
        # --batch_size counts the images of all ranks together: the rate fits any number of them.
        return utils.train_loader(train_set, self.args)

    def make_optimizer(self, parameters, num_epochs, lr):
        """SGD, fresh for each fit, and a schedule: the rate falls from lr to 0 along a cosine."""
        sgd = utils.SGD(parameters, lr, self.args)
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, num_epochs)

    def train_epoch(self, loader, optimizer):
        """One pass over the data: each step, every rank takes its share of the global batch."""
        utils.train_mode(self.model, self.resting)
        meter = utils.Meter(self, len(loader))
        for images, targets in utils.to_device(loader, self.args):  # (batch / ranks, 3, H, W)
            with utils.autocast(self.args):
                loss, logits = self.compute_loss(images, targets)
            utils.step(loss, optimizer, self.run.scaler)  # zero_grad, backward, step
            meter.update(loss, logits, targets)  # sums on the device: no step waits for them
        return meter.averages()

    def compute_loss(self, images, targets):
        """(1 - lambda) CE + lambda KD. Returns the loss, a scalar, and the logits."""
        # parallel_model, not model: only a call of the DDP wrapper averages the gradients.
        logits, _ = self.parallel_model(images)  # (batch, known + new)
        # CE over all classes: new images and exemplars are ordinary samples of the batch.
        loss = F.cross_entropy(logits, targets, label_smoothing=self.args.smooth)
        # The more classes are known already, the more the old answers count.
        dynamic = self.known_classes / logits.shape[1]
        weight = dynamic if self.args.lambda_kd == "dynamic" else self.args.lambda_kd
        if self.teacher is not None and weight > 0:
            # No factor T^2, unlike in other papers: WA has none. At T = 2 it would make KD four
            # times as strong; digits came out worse with it (chapter 7).
            kd = knowledge_distillation(logits, self.teacher(images)[0], self.args.temperature)
            loss = (1 - weight) * loss + weight * kd
        return loss, logits

    def update_memory(self, new_data):
        """Share the memory equally among the classes: cut the old, choose from the new."""
        seen = self.known_classes + self.nb_new
        m = self.args.memory_size // (sum(self.run.increments) if self.args.fixed_memory else seen)
        # Exemplars are kept in the order of their choice, so the first m are the best m.
        self.exemplars = [images.select(slice(m)) for images in self.exemplars]
        # From the features of clean images, which are the same on all ranks. From augmented ones
        # each rank would choose its own: together several times --memory_size, silently.
        if len(self.exemplars) == self.known_classes:  # else chosen already, or no memory
            self.exemplars += utils.select_exemplars(self, new_data, m, herding)

    def finish_task(self):
        """Weight alignment: give the new prototypes the mean norm of the old ones."""
        if self.known_classes and not self.args.no_align:
            self.run.results["gammas"].append(self.model.align_weights(self.nb_new))

    def predict(self, images):
        """Scores of all classes so far, (batch, known + new); the largest is the answer."""
        # The bare model: no gradients here, so nothing for DDP to average.
        return self.model(images)[0]


def main(args, Trainer=CilTrainer, Run=utils.Run):
    """Learn the tasks one after the other; every rank runs this loop, in step with the others."""
    args = utils.setup(args)
    # From the package continuum: which images belong to which task. A label is the position of
    # its class in the order of learning.
    train_scenario, test_scenario = utils.build_scenarios(args)
    trainer = Trainer(args)
    trainer.run = run = Run(trainer, train_scenario, test_scenario)
    for task, nb_new in enumerate(run.increments[:args.stop_after_task]):  # (None: all)
        utils.set_seed(args, task)  # all that is random before the first epoch
        trainer.task, trainer.nb_new, trainer.stage = task, nb_new, 0
        new_data = train_scenario.images(task)
        trainer.expand_model(nb_new, new_data)
        # A resumed run passes its finished tasks without training: so the model gets its shape.
        if task >= run.first_task:  # 0 in a new run
            # Weights, teacher and exemplars, if there is a checkpoint of this task.
            run.restore(trainer)
            # (Resumed in a second stage, the list holds the new classes' exemplars already.)
            trainer.train_task(new_data.join(trainer.exemplars[:trainer.known_classes]))
            # Memory first, so that a method can use this task's exemplars in finish_task.
            trainer.update_memory(new_data)
            trainer.finish_task()
            run.end_task(trainer, utils.evaluate(trainer))
        # From now on these classes are old: the next model is to imitate this, aligned, one.
        trainer.teacher = utils.frozen_copy(trainer.model, args)
        trainer.known_classes += nb_new
    run.finish(trainer)


if __name__ == "__main__":
    main(utils.get_parser().parse_args())
