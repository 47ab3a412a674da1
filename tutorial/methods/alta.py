"""ALTA: "Cross-Modal Alternating Learning with Task-Aware Representations for Continual Learning"
(IEEE Transactions on Multimedia, 2023), on a frozen CLIP. Chapter 21.

    torchrun --nproc_per_node=2 -m tutorial.methods.alta
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import utils
from template import CilModel, CilTrainer, main
from tutorial.methods import clip_towers

# The nine methods. A logit is s times a sum of cosines of (image side, text side):
#   x: the image as CLIP sees it; A: the adapter's version of it; x + A: both added
#   w: the prompt "a photo of a NAME"; u: "a photo of a NAME." with four learnt vectors, the context
#   v, in place of the first four words; u_t: likewise, but a class keeps the context of the end of
#   its own task
METHODS = {"mlp": [("A", "w")], "resmlp": [("x + A", "w")],
           "sprompt": [("x", "u")], "cprompt": [("x", "u_t")],
           "cprompt_oriprompt": [("x", "u_t"), ("x", "w")],
           "cprompt_mlp": [("A", "u_t")], "cprompt_resmlp": [("x + A", "u_t")],
           "oriclip2cprompt_mlp": [("x", "w"), ("A", "u_t")],
           "oritext_mlp2cprompt_oriimg": [("x", "u_t"), ("A", "w")]}  # ALTA


class Reservoir(nn.Module):
    """Of all samples that were ever offered, each is kept with the same chance (Vitter, 1985).

    Holds the image's features as CLIP sees it (size, D), the logits it had then (size, classes),
    and its label: no images. All ranks hold the same, since they are offered the same.
    """

    def __init__(self, size, image_dim, nb_classes):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, image_dim))
        self.register_buffer("logits", torch.full((size, nb_classes), torch.nan))  # nan: had none
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("offered", torch.tensor(0))  # also the same image in another epoch

    def offer(self, features, logits, labels, random):
        """The i-th sample ever (from 0) goes to slot i, or, when all slots are taken, to one drawn
        from 0 to i, if there is such a slot."""
        size, offered, slots = len(self.labels), int(self.offered), {}
        for row in range(len(labels)):
            i = offered + row
            slots[i if i < size else random.randint(i + 1)] = row  # of two for a slot, the later
        taken = [(slot, row) for slot, row in slots.items() if slot < size]
        self.offered += len(labels)
        if taken:
            slots, rows = torch.tensor(taken, device=labels.device).T
            self.features[slots], self.labels[slots] = features[rows], labels[rows]
            self.logits[slots, :logits.shape[1]] = logits[rows]

    def draw(self, count, random):
        """Up to count different slots."""
        filled = min(int(self.offered), len(self.labels))
        return random.choice(filled, min(count, filled), replace=False)


class CrossModalModel(CilModel):
    """What learns on top of the frozen towers: a context (4, W), an adapter, or both."""

    def __init__(self, towers, method, all_columns):
        nn.Module.__init__(self)  # no timm backbone and no heads, unlike the model above it
        self.towers, self.terms, dim = towers, METHODS[method], towers.image_dim
        images, texts = ({term[side] for term in self.terms} for side in (0, 1))
        if images != {"x"}:
            self.adapter = nn.Sequential(nn.Linear(dim, dim // 16), nn.ReLU(),
                                         nn.Linear(dim // 16, dim))
        if texts != {"w"}:
            words = towers.tokenize(["a photo of a"])[:, 1:-1]  # (1, 4)
            self.context = nn.Parameter(towers.clip.token_embedding(words)[0].detach().clone())
            # Row t: the context as it was when task t ended.
            self.register_buffer("bank", torch.zeros(0, *self.context.shape))
        self.replays = images != {"x"}  # a context alone never replays
        self.all_columns, self.increments, self.past, self.memo = all_columns, [], [], {}

    def set_classes(self, names, memory_size):
        """The prompts of all classes, in the order of learning, and the memory."""
        towers = self.towers
        self.tokens = towers.tokenize([f"a photo of a {name}." for name in names])  # (classes, L)
        with torch.no_grad():
            self.hand_made = towers.encode_prompts(
                towers.tokenize([f"a photo of a {name}" for name in names]))  # (classes, D)
        self.memory = Reservoir(memory_size * self.replays, towers.image_dim, len(names))

    def expand(self, nb_new):
        if self.increments and hasattr(self, "bank"):
            self.bank = torch.cat([self.bank, self.context.detach()[None]])
        self.increments.append(nb_new)

    def train(self, mode=True):
        self.memo = {}  # what an evaluation, which begins with eval(), may use again
        return super().train(mode)

    def past_prompts(self):
        """Of each old task its prompts (classes, D), with the context from the end of that task:
        constants, so each is computed once."""
        ends = np.cumsum([0, *self.increments])
        with torch.no_grad():
            for t in range(len(self.past), len(self.bank)):
                self.past.append(self.towers.encode_prompts(
                    self.tokens[ends[t]:ends[t + 1]], self.bank[t]))
        return self.past

    def text_side(self, kind):
        """Normalised prompts (columns, D) of the classes so far, or of all: --columns."""
        columns = len(self.tokens) if self.all_columns else sum(self.increments)
        if kind == "w":
            return self.hand_made[:columns]
        if kind in self.memo and not torch.is_grad_enabled():
            return self.memo[kind]
        past = self.past_prompts() if kind == "u_t" else []
        # Of this task and, with --columns all, of the tasks to come: the living context.
        living = self.tokens[sum(map(len, past)):columns]
        prompts = torch.cat([*past, self.towers.encode_prompts(living, self.context)])
        if not torch.is_grad_enabled():
            self.memo[kind] = prompts
        return prompts

    def forward(self, x):
        """x: (n, D), images as CLIP sees them. Returns logits (n, columns), and x."""
        texts = [self.text_side(text) for _, text in self.terms]
        # The towers may compute in 16 bits (--amp); what learns, and the cosines, in 32.
        with torch.autocast(x.device.type, enabled=False):
            adapted = self.adapter(x) if self.replays else 0
            sides = {"x": x, "A": adapted, "x + A": x + adapted}
            cosines = [F.normalize(sides[image], dim=1) @ text.T
                       for (image, _), text in zip(self.terms, texts)]
            return self.towers.scale * sum(cosines), x


def fingerprints(images):
    """A number of 64 bits for the content of each image, (batch,), the same on every rank: the bits
    of its pixels times fixed random numbers, added up modulo 2^64."""
    bits = images.contiguous().flatten(1).view(torch.int32)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-2 ** 62, 2 ** 62, bits.shape[1:], generator=generator) * 2 + 1
    return (bits * numbers.to(bits.device)).sum(dim=1)


class ALTA(CilTrainer):
    """A context and an adapter on a frozen CLIP, and a memory of features."""

    def __init__(self, args):
        self.args, towers = args, clip_towers.load(args)
        args.config["clip"] = towers.fingerprint()  # a run is never resumed on other towers
        utils.set_seed(args)
        self.model = CrossModalModel(towers, args.clip_method, args.columns == "all")
        self.teacher, self.exemplars, self.known_classes, self.resting = None, [], 0, []

    def expand_model(self, nb_new, new_data):
        """In the first task the names of all classes become prompts."""
        if self.task == 0:
            names = clip_towers.readable(self.run.results["class_names"])
            self.model.set_classes(names, self.args.memory_size)
            self.encode_test_images()
        self.model.expand(nb_new)
        self.model.to(self.args.device)

    @torch.no_grad()
    def encode_test_images(self):
        """The towers never change, so each test image goes through them once in a run."""
        args, test_set = self.args, self.run.test_scenario.images(slice(None))
        features = [torch.zeros(0, self.model.towers.image_dim, device=args.device)]
        keys = [torch.zeros(0, dtype=torch.int64, device=args.device)]
        for images, _ in utils.clean_batches(test_set, args):
            with utils.autocast(args):
                features.append(self.model.towers.encode_images(images))
            keys.append(fingerprints(images))
        keys = utils.gather(torch.cat(keys), len(test_set), args).tolist()
        self.row_of = {key: row for row, key in enumerate(keys)}
        self.test_features = utils.gather(torch.cat(features), len(test_set), args)  # on every rank

    def make_optimizer(self, parameters, num_epochs, lr):
        """The template's, with a constant learning rate if --schedule says so."""
        optimizer, scheduler = super().make_optimizer(parameters, num_epochs, lr)
        if self.args.schedule == "constant":
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return optimizer, scheduler

    def train_epoch(self, loader, optimizer):
        """What is drawn for the memory follows from the epoch, and is the same on every rank."""
        self.random = np.random.RandomState(loader.sampler.seed)
        return super().train_epoch(loader, optimizer)

    def compute_loss(self, images, targets):
        """CE + alpha CE(memory) + beta MSE(logits of the memory, now and then)."""
        args, memory, size = self.args, self.model.memory, len(images) * self.args.world_size
        x = self.model.towers.encode_images(images)  # (batch, D)
        # A batch of the memory as large as that of the images, shared by the ranks like it.
        slots = memory.draw(size, self.random)[args.rank::args.world_size]
        logits, _ = self.parallel_model(torch.cat([x, memory.features[slots]]))
        logits, again = logits[:len(x)], logits[len(x):]
        loss = F.cross_entropy(logits, targets)
        if len(memory.labels):
            ce = F.cross_entropy(again, memory.labels[slots], reduction="none")
            then = memory.logits[slots, :again.shape[1]]  # nan: a class that came later
            known = ~then.isnan()
            errors = (again - then.where(known, again)) ** 2
            loss = (loss + args.alpha * utils.global_mean(ce, torch.ones_like(ce), args)
                    + args.beta * utils.global_mean(errors, known, args))
            memory.offer(*(utils.gather(rows, size, args)
                           for rows in (x, logits.detach(), targets)), self.random)
        return loss, logits

    def update_memory(self, new_data):
        """Nothing is left to do: the memory took its share in every step."""

    def predict(self, images):
        """Logits of --columns; of a test image the features are known already."""
        rows = [self.row_of.get(key) for key in fingerprints(images).tolist()]
        return self.model(self.model.towers.encode_images(images) if None in rows else
                          self.test_features[rows])[0]


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("ALTA").add_argument
    add("--clip_method", default="oritext_mlp2cprompt_oriimg", choices=METHODS, help="(ALTA)")
    add("--visual", choices=clip_towers.VISUALS, help="image tower, which decides the "
        "input size (tiny for digits, else RN50)")
    add("--clip_weights", default="openai", help="a file, or openai; tiny: a file, or it is "
        "trained now (openai)")
    add("--alpha", type=utils.number(0), default=0.4, help="weight of the memory's labels (0.4)")
    add("--beta", type=utils.number(0), default=0.4, help="weight of the memory's logits (0.4)")
    add("--columns", default="seen", choices=["seen", "all"], help="classes that compete, in "
        "training and test: those so far, or those to come as well (seen)")
    add("--schedule", default="cosine", choices=["cosine", "constant"], help="of the learning "
        "rate; constant: at 1e-5, as released (cosine)")
    paper = dict(num_bases=0, aa="none", num_epochs=30, batch_size=32, lr=0.002,
                 weight_decay=5e-4, memory_size=200)
    parser.set_defaults(class_order="natural", crop_pct=1.0, no_align=True,
                        presets={"all": paper, "imagenet1000": dict(memory_size=1000)})
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    args.visual = args.visual or ("tiny" if args.data_set == "digits" else "RN50")
    side = clip_towers.VISUALS[args.visual]
    if args.input_size not in (None, side):
        utils.fail(f"--input_size {args.input_size}: the image tower {args.visual} takes {side}")
    if args.compile:
        utils.fail("--compile: this method's prompts change from task to task, so leave it out")
    args.input_size = side
    if args.schedule == "constant":
        args.lr = args.lr or 1e-5
    main(args, ALTA)
