"""States of one short recurrence by every rule, as numbers that no code here has computed.

h' = a h + v with samples v = B u at the ends of four unequal steps, from 0.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

STEPS, INPUTS, MATRIX = (0.1, 0.3, 0.2, 0.4), (0.5, 1.2, -0.3, 0.9), (1.0, -0.5, 2.0, 0.8)
REAL_A, COMPLEX_A = -0.7, -0.7 + 3j
# Half of the last digit, and a little.
REAL_ROUNDING, COMPLEX_ROUNDING = 6e-10, 8e-8

# By rule and whether in true time: the states of REAL_A, and the last one of COMPLEX_A.
GOLDEN = {
    ("mamba", False): ((0.05, -0.139470788, -0.241250078, 0.105667114), 0.2579321 - 0.1883249j),
    ("zoh", False): (
        (0.048290129, -0.123213143, -0.219095016, 0.085605415),
        0.2313737 - 0.0291020j,
    ),
    ("foh", False): (
        (0.048290129, 0.020408412, -0.094236434, -0.039558042),
        0.0147383 - 0.1147002j,
    ),
    ("bilinear", False): (
        (0.048309179, -0.123767679, -0.219723310, 0.086875398),
        0.2056666 - 0.0640732j,
    ),
    ("tustin", False): (
        (0.048309179, 0.025553588, -0.089939405, -0.046796393),
        -0.0226983 - 0.0724109j,
    ),
    ("poly", False): (
        (0.057142596, 0.002797851, -0.130069038, -0.028312953),
        0.0498484 - 0.1208307j,
    ),
    ("poly", True): (
        (0.049765540, -0.008139121, -0.125895373, -0.025158565),
        0.0563511 - 0.1142450j,
    ),
    ("highorder", False): (
        (0.048290129, 0.045194644, -0.089790584, -0.074524729),
        -0.0269878 - 0.1353147j,
    ),
    ("highorder", True): (
        (0.048290129, 0.057587760, -0.071035470, -0.073125515),
        -0.0417796 - 0.1298820j,
    ),
    ("rk4_constant", False): (
        (0.048290119, -0.123210174, -0.219092114, 0.085590517),
        0.2238343 - 0.0349538j,
    ),
    ("rk4", False): (
        (0.048290119, 0.020381612, -0.094259349, -0.039472655),
        0.0089624 - 0.1039549j,
    ),
}
