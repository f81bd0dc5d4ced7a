// The experts that served each mixture's answer, side by side: by layer, by type of token, and by task.

const VIEWS = {
  layers: "Mean weight of each expert in each layer. Choose a letter to answer again with only that expert.",
  types: "Of the tokens of each type in this answer, the share whose main expert (its letter in the answer) is each expert.",
  tasks: "Share of each expert in the layer in which the tasks differ most, measured on the test items of each task (results.json), and in this answer.",
};

class Experts {
  // Calls solo(column, expert) when a visitor wants one expert alone.
  constructor(box, solo) {
    this.box = box;
    this.solo = solo;
    this.view = "layers";
    this.blocks = [];
    this.columns = "";
    for (const button of box.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => {
        this.view = button.dataset.view;
        this.paint(...this.painted);
      });
    }
  }

  // mixtures: [{column, answer, solos}], solos: its experts that a column of this run has alone; count: of the tokens
  // shown; open: the mixture that a phone shows.
  paint(mixtures, count, open) {
    this.painted = [mixtures, count, open];
    this.box.hidden = !mixtures.length;
    if (!mixtures.length) return;
    const columns = JSON.stringify(mixtures.map(({ column, answer }) => [column, answer.about]));
    if (columns !== this.columns) {
      this.columns = columns;
      this.blocks = mixtures.map(({ answer }) => new Mixture(answer.about));
      this.box.querySelector(".ml-mixtures").replaceChildren(...this.blocks.map((block) => block.box));
    }
    const measured = mixtures.some(({ answer }) => answer.about.routing);
    if (this.view === "tasks" && !measured) this.view = "layers";
    for (const button of this.box.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.view === this.view));
      if (button.dataset.view === "tasks") button.hidden = !measured;
    }
    this.box.querySelector(".ml-heat-hint").textContent = VIEWS[this.view];
    mixtures.forEach(({ column, answer, solos }, index) => {
      const block = this.blocks[index];
      block.box.dataset.open = column === open || (open === null && index === 0) ? "yes" : "no";
      block.paint(this.view, answer.tokens.slice(0, count), solos, (expert) => this.solo(column, expert));
    });
  }
}

class Mixture {
  constructor(about) {
    this.about = about;
    this.box = make("article", "ml-mixture");
    this.words = make("h4", "ml-heat-words");
    this.place = make("div", "ml-heat-place");
    this.place.tabIndex = 0;
    this.place.setAttribute("role", "group");
    this.place.setAttribute("aria-label", `Experts of ${about.name}`);
    this.box.append(this.words, this.place);
    this.shape = "";
  }

  paint(view, tokens, solos, solo) {
    const { name, experts, routing } = this.about;
    const routed = tokens.filter((token) => token.r);
    const layers = routed.length ? routed[0].r.length : 0;
    const count = `${tokens.length} ${tokens.length === 1 ? "token" : "tokens"}`;
    if (view === "layers") {
      this.words.textContent = layers ? `${count} through ${layers} layers of ${name}` : `Experts of ${name}`;
      this.paintLayers(expertUse(tokens, experts, tokens.length), layers, solos, solo);
    } else if (view === "types") {
      this.words.textContent = `${count} of ${name}`;
      this.paintShares("type of token", typeShares(tokens, experts));
    } else {
      this.words.textContent = routing ? `Layer ${routing.layer} of ${name}` : `${name}: not measured`;
      const rows = routing ? routing.tasks.map(({ task, load }) => ({ title: task, shares: load })) : [];
      if (rows.length && layers >= routing.layer) {
        rows.push({ title: "This answer", strong: true, shares: slotShares(routed, experts, routing.layer - 1) });
      }
      this.paintShares("task", rows);
    }
  }

  paintLayers(use, layers, solos, solo) {
    const shape = JSON.stringify([use.length, layers, solos]);
    if (shape !== this.shape) this.buildLayers(use.length, layers, solos, solo);
    this.shape = shape;
    use.forEach((row, expert) => {
      row.forEach((share, layer) => {
        const cell = this.cells[expert][layer];
        if (!this.isIn(expert, layer)) return;
        const text = percent(share);
        if (cell.textContent === text) return;
        cell.textContent = text;
        cell.style.setProperty("--w", share.toFixed(3));
      });
      const has = row.filter((_, layer) => this.isIn(expert, layer));
      this.totals[expert].textContent = has.length ? percent(has.reduce((sum, share) => sum + share, 0) / has.length) : "";
    });
  }

  // Layers may have different numbers of experts.
  isIn(expert, layer) {
    const counts = this.about.experts_by_layer || [];
    return expert < (layer < counts.length ? counts[layer] : this.about.experts);
  }

  buildLayers(experts, layers, solos, solo) {
    const table = make("table", "ml-heat-table");
    table.append(make("caption", "ml-unseen", `Mean routing weight of each expert of ${this.about.name} in each layer`));
    const head = table.createTHead().insertRow();
    head.append(make("td"));
    // A heading over five layers each, since thirty numbers have no room.
    for (let layer = 0; layer < layers; layer += 5) {
      const cell = head.appendChild(heading("colgroup", String(layer + 1)));
      cell.colSpan = Math.min(5, layers - layer);
      cell.setAttribute("aria-label", `layers ${layer + 1} to ${layer + cell.colSpan}`);
    }
    head.append(heading("col", "mean", "ml-heat-mean"));
    const body = table.createTBody();
    this.cells = [];
    this.totals = [];
    for (let expert = 0; expert < experts; expert++) {
      const row = body.insertRow();
      row.style.setProperty("--e", hueOf(expert));
      const button = make("button", "ml-solo", letterOf(expert));
      button.type = "button";
      button.title = `Answer again with expert ${letterOf(expert)} alone`;
      button.setAttribute("aria-label", `Expert ${letterOf(expert)} alone, ${this.about.name}`);
      button.setAttribute("aria-pressed", String(solos.includes(expert)));
      button.addEventListener("click", () => solo(expert));
      if (expert >= (this.about.solo_choices ?? this.about.experts)) {
        button.disabled = true;
        button.title = `Not every layer has expert ${letterOf(expert)}`;
      }
      row.appendChild(heading("row", "")).append(button);
      const cell = (_, layer) => row.appendChild(make("td", this.isIn(expert, layer) ? "ml-cell" : ""));
      this.cells.push(Array.from({ length: layers }, cell));
      this.totals.push(row.appendChild(make("td", "ml-heat-mean")));
    }
    this.place.replaceChildren(table);
  }

  // rows: [{title, shares: one an expert}]
  paintShares(what, rows) {
    const shape = JSON.stringify([what, rows]);
    if (shape === this.shape) return;
    this.shape = shape;
    const table = make("table", "ml-share-table");
    table.append(make("caption", "ml-unseen", `Share of each expert of ${this.about.name} by ${what}`));
    const head = table.createTHead().insertRow();
    head.append(heading("col", what));
    for (let expert = 0; expert < this.about.experts; expert++) head.append(heading("col", letterOf(expert)));
    const body = table.createTBody();
    for (const { title, shares, strong } of rows) {
      const row = body.insertRow();
      row.append(heading("row", title, strong ? "ml-strong-row" : ""));
      shares.forEach((share, expert) => {
        const cell = row.appendChild(make("td", "", percent(share)));
        cell.style.setProperty("--e", hueOf(expert));
        cell.style.setProperty("--w", share.toFixed(3));
      });
    }
    this.place.replaceChildren(table);
  }
}

function heading(scope, text, classes = "") {
  const cell = make("th", classes, text);
  cell.setAttribute("scope", scope);
  return cell;
}
