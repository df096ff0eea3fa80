"""The 25 non-stiff problems of DETEST (Hull, Enright, Fellen, Sedgwick 1972, SIAM J. Numer. Anal. 9, 603-637).

Each is a function of (t, y) for y of shape (..., n), and a start; all are solved over [0, 20].
"""

import math

import torch
from torch import Tensor

END = 20.0


def stacked(*parts: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def scalar(f):
    return lambda t, y: f(t, y)


def chain(rates):
    """A decay chain: each link feeds the next, and the last one keeps what it gets."""
    rates = torch.tensor(rates, dtype=torch.float64)

    def f(t, y):
        flow = rates * y[..., :-1]
        zero = torch.zeros_like(y[..., :1])
        return torch.cat((zero, flow), -1) - torch.cat((flow, zero), -1)

    return f, [1.0] + [0.0] * len(rates)


def diffusion(n):
    def f(t, y):
        zero = torch.zeros_like(y[..., :1])
        return torch.cat((y[..., 1:], zero), -1) + torch.cat((zero, y[..., :-1]), -1) - 2 * y

    return f, [1.0] + [0.0] * (n - 1)


MASSES = [0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778]
PLANETS = [
    [3.42947415189, 3.35386959711, 1.35494901715],
    [6.64145542550, 5.97156957878, 2.18231499728],
    [11.2630437207, 14.6952576794, 6.27960525067],
    [-30.1552268759, 1.65699966404, 1.43785752721],
    [-21.1238353380, 28.4465098142, 15.3882659679],
]
SPEEDS = [
    [-0.557160570446, 0.505696783289, 0.230578543901],
    [-0.415570776342, 0.365682722812, 0.169143213293],
    [-0.325325669158, 0.189706021964, 0.0877265322780],
    [-0.0240476254170, -0.287659532608, -0.117219543175],
    [-0.176860753121, -0.216393453025, -0.0148647893090],
]


def planets():
    mass = torch.tensor(MASSES, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64)[..., None]

    def f(t, y):
        q, v = y.reshape(*y.shape[:-1], 2, 5, 3).unbind(-3)
        pull = q / q.norm(dim=-1, keepdim=True) ** 3
        apart = q.unsqueeze(-3) - q.unsqueeze(-2)  # [j, k] from j to k
        near = apart / (apart.norm(dim=-1, keepdim=True) + eye) ** 3
        others = (mass[:, None] * (near - pull.unsqueeze(-3)) * (1 - eye)).sum(-2)
        a = 2.95912208286 * (others - (1.00000597682 + mass)[:, None] * pull)
        return torch.stack((v, a), -3).reshape(y.shape)

    return f, [x for rows in (PLANETS, SPEEDS) for row in rows for x in row]


def orbit(e):
    def f(t, y):
        x, v = y[..., :2], y[..., 2:]
        return torch.cat((v, -x / (x.square().sum(-1, keepdim=True)) ** 1.5), -1)

    return f, [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]


def b1(t, y):
    a, b = y.unbind(-1)
    return stacked(2 * (a - a * b), -(b - a * b))


def b2(t, y):
    a, b, c = y.unbind(-1)
    return stacked(-a + b, a - 2 * b + c, b - c)


def b3(t, y):
    a, b, _ = y.unbind(-1)
    return stacked(-a, a - b * b, b * b)


def b4(t, y):
    a, b, c = y.unbind(-1)
    r = (a * a + b * b).sqrt()
    return stacked(-b - a * c / r, a - b * c / r, a / r)


def b5(t, y):
    a, b, c = y.unbind(-1)
    return stacked(b * c, -a * c, -0.51 * a * b)


def e1(t, y):
    a, b = y.unbind(-1)
    return stacked(b, -(b / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * a))


def e2(t, y):
    a, b = y.unbind(-1)
    return stacked(b, (1 - a * a) * b - a)


def e3(t, y):
    a, b = y.unbind(-1)
    return stacked(b, a**3 / 6 - a + 2 * torch.sin(2.78535 * t))


def e4(t, y):
    _, b = y.unbind(-1)
    return stacked(b, 0.032 - 0.4 * b * b)


def e5(t, y):
    _, b = y.unbind(-1)
    return stacked(b, (1 + b * b).sqrt() / (25 - t))


PROBLEMS = {
    "A1": (scalar(lambda t, y: -y), [1.0]),
    "A2": (scalar(lambda t, y: -(y**3) / 2), [1.0]),
    "A3": (scalar(lambda t, y: y * torch.cos(t)), [1.0]),
    "A4": (scalar(lambda t, y: y / 4 * (1 - y / 20)), [1.0]),
    "A5": (scalar(lambda t, y: (y - t) / (y + t)), [4.0]),
    "B1": (b1, [1.0, 3.0]),
    "B2": (b2, [2.0, 0.0, 1.0]),
    "B3": (b3, [1.0, 0.0, 0.0]),
    "B4": (b4, [3.0, 0.0, 0.0]),
    "B5": (b5, [0.0, 1.0, 1.0]),
    "C1": chain([1.0] * 9),
    "C2": chain([float(i) for i in range(1, 10)]),
    "C3": diffusion(10),
    "C4": diffusion(51),
    "C5": planets(),
    **{f"D{i}": orbit(e) for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), 1)},
    "E1": (e1, [0.6713967071418030, 0.09540051444747446]),
    "E2": (e2, [2.0, 0.0]),
    "E3": (e3, [0.0, 0.0]),
    "E4": (e4, [30.0, 0.0]),
    "E5": (e5, [0.0, 0.0]),
}


def problem(name: str):
    """The field, and the start in double precision."""
    f, y0 = PROBLEMS[name]
    return f, torch.tensor(y0, dtype=torch.float64)
