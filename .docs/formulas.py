"""The formula of each method, in LaTeX. W is (in, out), n = min(in, out)."""

FORMULAS = {
    "svf": r"W' = U \operatorname{diag}\bigl(s \odot (1 + \delta)\bigr) V^\top,"
    r" \qquad \delta \in \mathbb{R}^n \text{ trains, } 0 \text{ at first}",
    "svft": r"W' = U \bigl(\operatorname{diag}(s) + M\bigr) V^\top,"
    r" \qquad M \text{ sparse trains, } 0 \text{ at first}",
    "pissa": r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
    r" A_0 = U_r \sqrt{s_r}, \quad B_0 = \sqrt{s_r} V_r^\top,"
    r" \qquad A, B \text{ train}",
    "milora": r"W' = W + \frac{\alpha}{r} (A B - A_0 B_0), \qquad"
    r" A_0 = U_{-r} \sqrt{s_{-r}}, \quad B_0 = \sqrt{s_{-r}} V_{-r}^\top,"
    r" \qquad A, B \text{ train}",
    "lora_xs": r"W' = W + \frac{\alpha}{r} U_r \operatorname{diag}(s_r) R"
    r" V_r^\top, \qquad R \in \mathbb{R}^{r \times r} \text{ trains, }"
    r" 0 \text{ at first}",
    "lora": r"W' = W + \frac{\alpha}{r} A B, \qquad A, B \text{ train, }"
    r" B = 0 \text{ at first}",
    "dora": r"W' = \Bigl(W + \frac{\alpha}{r} A B\Bigr)"
    r" \operatorname{diag}\Bigl(\frac{m}{\| W + \frac{\alpha}{r} A B \|}"
    r"\Bigr), \qquad A, B, m \text{ train}",
    "adalora": r"W' = W + \frac{\alpha}{r} P"
    r" \operatorname{diag}(\lambda \odot \mathrm{mask}) Q,"
    r" \qquad P, \lambda, Q \text{ train}",
}
