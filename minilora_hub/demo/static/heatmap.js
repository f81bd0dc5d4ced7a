// The experts that served the answer, layer by layer: a heat map as a table, with its numbers as text.

class Heatmap {
  // Calls choose(column) when a visitor selects another mixture, and solo(column, expert) for one expert alone.
  constructor(box, choose, solo) {
    this.box = box;
    this.solo = solo;
    this.shape = "";
    this.which = box.querySelector(".ml-which");
    this.which.addEventListener("change", () => choose(Number(this.which.value)));
  }

  // mixtures: [[column index, name]]; use: from `expertUse`; solos: experts that a column of this run has alone.
  paint(mixtures, chosen, name, use, solos, tokens) {
    this.box.hidden = !mixtures.length;
    if (!mixtures.length) return;
    const options = JSON.stringify(mixtures);
    if (options !== this.options) {
      this.options = options;
      this.which.hidden = mixtures.length < 2;
      this.which.replaceChildren(
        ...mixtures.map(([index, label]) => Object.assign(make("option", "", label), { value: index })),
      );
    }
    this.which.value = chosen;
    const layers = use.length && use[0].length;
    this.box.querySelector(".ml-heat-words").textContent = layers
      ? `${tokens} ${tokens === 1 ? "token" : "tokens"} through ${layers} layers of ${name}`
      : `Experts of ${name}`;
    const shape = JSON.stringify([chosen, use.length, layers, solos]);
    if (shape !== this.shape) this.build(chosen, use.length, layers, solos, name);
    this.shape = shape;
    use.forEach((row, expert) => {
      row.forEach((share, layer) => {
        const cell = this.cells[expert][layer];
        const text = percent(share);
        if (cell.textContent === text) return;
        cell.textContent = text;
        cell.style.setProperty("--w", share.toFixed(3));
      });
      const mean = layers ? row.reduce((sum, share) => sum + share, 0) / layers : 0;
      this.totals[expert].textContent = layers ? percent(mean) : "";
    });
  }

  build(column, experts, layers, solos, name) {
    const table = make("table", "ml-heat-table");
    table.append(make("caption", "ml-unseen", `Mean routing weight of each expert of ${name} in each layer`));
    const head = table.createTHead().insertRow();
    head.append(make("td"));
    for (let layer = 0; layer < layers; layer++) {
      const cell = make("th", "", layer % 5 && layer !== layers - 1 ? "" : String(layer + 1));
      cell.setAttribute("scope", "col");
      cell.setAttribute("aria-label", `layer ${layer + 1}`);
      head.append(cell);
    }
    head.append(make("th", "ml-heat-mean", "mean"));
    const body = table.createTBody();
    this.cells = [];
    this.totals = [];
    for (let expert = 0; expert < experts; expert++) {
      const row = body.insertRow();
      row.style.setProperty("--e", hueOf(expert));
      const title = make("th");
      title.setAttribute("scope", "row");
      const button = make("button", "ml-solo", letterOf(expert));
      button.type = "button";
      button.title = `Answer again with expert ${letterOf(expert)} alone`;
      button.setAttribute("aria-label", `Expert ${letterOf(expert)} alone`);
      button.setAttribute("aria-pressed", String(solos.includes(expert)));
      button.addEventListener("click", () => this.solo(column, expert));
      title.append(button);
      row.append(title);
      this.cells.push(Array.from({ length: layers }, () => row.appendChild(make("td", "ml-cell"))));
      this.totals.push(row.appendChild(make("td", "ml-heat-mean")));
    }
    this.box.querySelector(".ml-heat-place").replaceChildren(table);
  }
}
