"""The losses written out in numpy float64, loop by loop: what the torch ones are held against."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def ranking(teacher, label):
    others = [c for c in range(len(teacher)) if c != label]
    return [label, *sorted(others, key=lambda c: (-teacher[c], c))]


def plackett_luce(student, order, weights):
    """sum over k of weights[k] (log sum over l >= k of exp s - s at k), by an explicit loop."""
    total = 0.0
    for k, c in enumerate(order):
        tail = student[order[k:]]
        top = tail.max()
        total += weights[k] * (top + np.log(sum(np.exp(s - top) for s in tail)) - student[c])
    return total


def weighted_ranking(student, order, weights):
    """The same value and its gradient, one step after the other, small as they may be.

    order: the classes that are ranked, best first; the others are the tail of every step.
    """
    student = student.astype(np.float64)
    gradient, value = np.zeros(len(student)), 0.0
    left = list(range(len(student)))
    for c, w in zip(order, weights, strict=True):
        left.remove(c)
        if not left:
            continue
        rest = np.logaddexp.reduce(student[left])
        value += w * np.logaddexp(0, rest - student[c])
        z = np.logaddexp(rest, student[c])
        gradient[c] -= w * np.exp(rest - z)  # 1 - p, without subtracting
        gradient[left] += w * np.exp(student[left] - z)
    return value, gradient


def pld_rows(student, teacher, labels, tau=1.0):
    """PLD's losses [B] and gradients [B, C]."""
    rows = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = ranking(t, y)
        rows.append(weighted_ranking(s, order, softmax((t.astype(np.float64)) / tau)[order]))
    return tuple(np.array(x) for x in zip(*rows, strict=True))


def pld(student, teacher, labels, tau=1.0):
    values = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = ranking(t, y)
        values.append(plackett_luce(s, order, softmax(t / tau)[order]))
    return np.mean(values)


def pld_gradient(student, teacher, labels, tau=1.0):
    """The paper's closed form: -alpha_j + exp(s_j) sum over k <= j of alpha_k / Z_k."""
    gradient = np.zeros_like(student)
    for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
        order = ranking(t, y)
        alpha = softmax(t / tau)[order]
        z = [np.exp(s[order[k:]]).sum() for k in range(len(order))]
        for j, c in enumerate(order):
            gradient[i, c] = -alpha[j] + np.exp(s[c]) * sum(alpha[k] / z[k] for k in range(j + 1))
    return gradient / len(student)


def cross_entropy(student, labels):
    return np.mean([-np.log(softmax(s)[y]) for s, y in zip(student, labels, strict=True)])


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def kd(student, teacher, labels, tau, ce_weight, divergence):
    values = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t / tau), softmax(s / tau)
        m = (p + q) / 2
        values.append(
            {
                "forward_kl": lambda p=p, q=q, m=m: kl(p, q),
                "reverse_kl": lambda p=p, q=q, m=m: kl(q, p),
                "jensen_shannon": lambda p=p, q=q, m=m: (kl(p, m) + kl(q, m)) / 2,
            }[divergence]()
        )
    return ce_weight * cross_entropy(student, labels) + (1 - ce_weight) * tau**2 * np.mean(values)


def dist(student, teacher, labels, tau, ce_weight, beta, gamma, tau_squared=True):
    p = np.stack([softmax(t / tau) for t in teacher])
    q = np.stack([softmax(s / tau) for s in student])
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    scale = tau**2 if tau_squared else 1
    return ce_weight * cross_entropy(student, labels) + scale * (beta * inter + gamma * intra)


def dkd(student, teacher, labels, tau, ce_weight, alpha, beta):
    values = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(t / tau), softmax(s / tau)
        rest = [c for c in range(len(s)) if c != y]
        target = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        others = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        values.append(alpha * target + beta * others)
    return ce_weight * cross_entropy(student, labels) + tau**2 * np.mean(values)


def log_softmax(z):
    return z - np.logaddexp.reduce(z)


def nkd_rows(student, teacher, labels, tau, ce_weight, gamma):
    """NKD's losses [B] and gradients [B, C], class by class."""
    values, gradients = np.zeros(len(student)), np.zeros(student.shape)
    for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
        log_q, weight = log_softmax(s), ce_weight + softmax(t)[y]
        values[i] = -weight * log_q[y]
        for c in range(len(s)):
            gradients[i, c] = weight * (np.exp(log_q[c]) - (c == y))
        rest = [c for c in range(len(s)) if c != y]
        others_p, others_q = softmax(t[rest] / tau), log_softmax(s[rest] / tau)
        for c, a, log_b in zip(rest, others_p, others_q, strict=True):
            values[i] -= gamma * tau**2 * a * log_b
            gradients[i, c] += gamma * tau * (np.exp(log_b) - a)
    return values, gradients


def ttm_rows(student, teacher, labels, tau, ce_weight, beta, weighted):
    """The losses [B] and gradients [B, C] of TTM, and of WTTM if weighted."""
    values, gradients = np.zeros(len(student)), np.zeros(student.shape)
    for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
        powers, log_q = np.exp(log_softmax(t) / tau), log_softmax(s)
        total = sum(powers)
        weight = beta * (total if weighted else 1)
        values[i] = -ce_weight * log_q[y]
        for c in range(len(s)):
            p = powers[c] / total
            values[i] += weight * p * (np.log(p) - log_q[c]) if p > 0 else 0
            gradients[i, c] = weight * (np.exp(log_q[c]) - p)
            gradients[i, c] += ce_weight * (np.exp(log_q[c]) - (c == y))
    return values, gradients


def mlkd(student, teacher, labels, taus, ce_weight, kd_weight, variant, standardized="none"):
    """MLKD by loops over temperatures, pairs of images and pairs of classes; 2B rows."""
    images, classes = len(labels) // 2, student.shape[1]
    sure = [softmax(t).max() for t in teacher[:images]]
    summed = sum(softmax(t) for t in teacher[:images])
    of_image = [float(x <= np.median(sure)) for x in sure]
    of_class = [float(x <= np.median(summed)) for x in summed]
    if variant == "paper":
        of_image, of_class = [1.0] * images, [1.0] * classes
    if variant == "released":
        of_image, of_class = [np.mean(of_image)] * images, [np.mean(of_class)] * classes
    seen = standardize(student) if standardized == "both" else student
    against = teacher if standardized == "none" else standardize(teacher)
    total = 0.0
    for number, tau in enumerate(taus):
        each = [
            tau**2 * kl(softmax(t / tau), softmax(s / tau))
            for s, t in zip(seen, against, strict=True)
        ]
        first, second = each[:images], each[images:]
        total += sum(w * x for w, x in zip(of_image, first, strict=True)) / images
        swapped = variant == "released" and number >= len(taus) - 2
        total += np.mean(first if swapped else second)
        p = np.array([softmax(t / tau) for t in teacher[:images]])
        q = np.array([softmax(s / tau) for s in student[:images]])
        for i in range(images):
            for j in range(images):
                total += of_image[j] * (p[i] @ p[j] - q[i] @ q[j]) ** 2 / images
        for a in range(classes):
            for b in range(classes):
                total += of_class[b] * (p[:, a] @ p[:, b] - q[:, a] @ q[:, b]) ** 2 / classes
    return kd_weight * total + 2 * ce_weight * cross_entropy(student, labels)


def standardize(logits):
    # the authors' code adds 1e-7, which counts where two classes have nearly the same logit
    return (logits - logits.mean(1, keepdims=True)) / (logits.std(1, ddof=1, keepdims=True) + 1e-7)
