"""Runge-Kutta methods: data only. Each entry is checked when this module is imported, and its order in the tests."""

from collections.abc import Callable
from dataclasses import replace

from .tableau import Tableau

euler = Tableau.parse(
    """
    0 |
      | 1""",
    name="euler",
    order=1,
    cite="Euler 1768",
)

midpoint = Tableau.parse(
    """
    0   |
    1/2 | 1/2
        | 0   1""",
    name="midpoint",
    order=2,
    cite="Runge 1895",
)

rk4 = Tableau.parse(
    """
    0   |
    1/2 | 1/2
    1/2 | 0   1/2
    1   | 0   0   1
        | 1/6 1/3 1/3 1/6""",
    name="rk4",
    order=4,
    cite="Kutta 1901; Hairer, Nørsett, Wanner 1993, II.1",
)

dopri5 = Tableau.parse(
    """
    0    |
    1/5  | 1/5
    3/10 | 3/40       9/40
    4/5  | 44/45      -56/15      32/9
    8/9  | 19372/6561 -25360/2187 64448/6561 -212/729
    1    | 9017/3168  -355/33     46732/5247 49/176  -5103/18656
    1    | 35/384     0           500/1113   125/192 -2187/6784    11/84
         | 35/384     0           500/1113   125/192 -2187/6784    11/84    0
         | 5179/57600 0           7571/16695 393/640 -92097/339200 187/2100 1/40""",
    name="dopri5",
    order=5,
    order_hat=4,
    cite="Dormand, Prince 1980, RK5(4)7M",
)

verner89 = Tableau.parse(
    """
    0                |
    1/12             | 1/12
    1/9              | 1/27 2/27
    1/6              | 1/24 0 1/8
    (2+2*sqrt(6))/15 | (4+94*sqrt(6))/375 0 -(94+84*sqrt(6))/125 (328+208*sqrt(6))/375
    (6+sqrt(6))/15   | (9-sqrt(6))/150 0 0 (312+32*sqrt(6))/1425 (69+29*sqrt(6))/570
    (6-sqrt(6))/15   | (927-347*sqrt(6))/1250 0 0 (-16248+7328*sqrt(6))/9375 (-489+179*sqrt(6))/3750
                       (14268-5798*sqrt(6))/9375
    2/3              | 2/27 0 0 0 0 (16-sqrt(6))/54 (16+sqrt(6))/54
    1/2              | 19/256 0 0 0 0 (118-23*sqrt(6))/512 (118+23*sqrt(6))/512 -9/256
    1/3              | 11/144 0 0 0 0 (266-sqrt(6))/864 (266+sqrt(6))/864 -1/16 -8/27
    1/4              | (5034-271*sqrt(6))/61440 0 0 0 0 0 (7859-1626*sqrt(6))/10240 (-2232+813*sqrt(6))/20480
                       (-594+271*sqrt(6))/960 (657-813*sqrt(6))/5120
    4/3              | (5996-3794*sqrt(6))/405 0 0 0 0 (-4342-338*sqrt(6))/9 (154922-40458*sqrt(6))/135
                       (-4176+3794*sqrt(6))/45 (-340864+242816*sqrt(6))/405 (26304-15176*sqrt(6))/45 -26624/81
    5/6              | (3793+2168*sqrt(6))/103680 0 0 0 0 (4042+2263*sqrt(6))/13824 (-231278+40717*sqrt(6))/69120
                       (7947-2168*sqrt(6))/11520 (1048-542*sqrt(6))/405 (-1383+542*sqrt(6))/720 2624/1053 3/1664
    1                | -137/1296 0 0 0 0 (5642-337*sqrt(6))/864 (5642+337*sqrt(6))/864 -299/48 184/81 -44/9 -5120/1053
                       -11/468 16/9
    1/6              | (33617-2168*sqrt(6))/518400 0 0 0 0 (-3846+31*sqrt(6))/13824 (155338-52807*sqrt(6))/345600
                       (-12537+2168*sqrt(6))/57600 (92+542*sqrt(6))/2025 (-1797-542*sqrt(6))/3600 320/567 -1/1920
                       4/105 0
    1                | (-36487-30352*sqrt(6))/279600 0 0 0 0 (-29666-4499*sqrt(6))/7456
                       (2779182-615973*sqrt(6))/186400 (-94329+91056*sqrt(6))/93200 (-232192+121408*sqrt(6))/17475
                       (101226-22764*sqrt(6))/5825 -169984/9087 -87/30290 492/1165 0 1260/233
                     | 103/1680 0 0 0 0 0 0 -27/140 76/105 -201/280 1024/1365 3/7280 12/35 9/280 0 0
                     | 23/525 0 0 0 0 0 0 171/1400 86/525 93/280 -2048/6825 -3/18200 39/175 0 9/25 233/4200""",
    name="verner89",
    order=8,
    order_hat=9,
    cite="Verner, SIAM J. Numer. Anal. 15 (1978) 772-790, the pair 8(9)",
)

# The fourteen stages that the 8th-order weights use: "RK-8, fixed" of HO-ResNet (Luo et al. 2021, arXiv 2103.15244).
verner8 = replace(verner89.pruned(), name="verner8")

METHODS: dict[str, Tableau] = {t.name: t for t in list(vars().values()) if isinstance(t, Tableau)}
FAMILIES: dict[str, Callable[..., Tableau]] = {}
