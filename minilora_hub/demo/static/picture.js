// Draw the comparison as a picture in the browser, to save as a file; nothing is uploaded.

const PICTURE_WIDTH = 1400;

class Picture {
  constructor(stage) {
    this.style = getComputedStyle(stage);
    this.canvas = document.createElement("canvas");
    this.pen = this.canvas.getContext("2d");
  }

  color(name) {
    return this.style.getPropertyValue("--ml-" + name).trim();
  }

  font(size, weight = 400, family = "system-ui, sans-serif") {
    this.pen.font = `${weight} ${size}px ${family}`;
  }

  // columns: [{about, now, tokens, kept, experts}]; kept and experts: the tokens to highlight, as on the page.
  // notes: lines below the columns.
  draw(title, prompt, notes, columns) {
    const per = Math.min(columns.length, 3);
    const width = (PICTURE_WIDTH - 120 - 28 * (per - 1)) / per;
    this.font(20);
    const boxes = columns.map((column) => this.flow(column.tokens, width - 48, 20));
    const rows = [];
    for (let i = 0; i < boxes.length; i += per) {
      rows.push(Math.max(...boxes.slice(i, i + per).map((box) => box.height)) + 164);
    }
    this.font(26);
    const asked = this.flow([{ t: prompt }], PICTURE_WIDTH - 120, 26);
    const top = 132 + asked.height;
    this.canvas.width = PICTURE_WIDTH;
    this.canvas.height = top + rows.reduce((sum, height) => sum + height + 28, 0) + 98;
    this.pen.fillStyle = this.color("paper");
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.pen.textBaseline = "alphabetic";
    this.write(title, 60, 78, 40, "ink", 600, "Georgia, serif");
    this.font(26);
    this.lines(asked, 60, 92, 26, "soft");
    columns.forEach((column, index) => {
      const y = top + rows.slice(0, Math.floor(index / per)).reduce((sum, height) => sum + height + 28, 0);
      this.card(column, boxes[index], 60 + (index % per) * (width + 28), y, width, rows[Math.floor(index / per)]);
    });
    notes.forEach((note, index) => this.write(note, 60, this.canvas.height - 66 + 28 * index, 20, "soft"));
    return this.canvas;
  }

  write(text, x, y, size, color, weight = 400, family = undefined) {
    this.font(size, weight, family);
    this.pen.fillStyle = this.color(color);
    this.pen.fillText(text, x, y);
  }

  // Break tokens into lines of at most `width`: {places: [{text, x, y, token}], height}.
  flow(tokens, width, size) {
    const places = [];
    let x = 0;
    let y = size * 1.35;
    const feed = () => {
      x = 0;
      y += size * 1.75;
    };
    tokens.forEach((token, index) => {
      for (const part of token.t.replace(/\t/g, "    ").split(/(\n|[^\S\n]+)/)) {
        if (part === "\n") feed();
        else {
          for (let rest = part; rest; ) {
            let cut = rest.length;
            const room = () => this.pen.measureText(rest.slice(0, cut)).width;
            if (x && x + room() > width) feed();
            while (cut > 1 && room() > width) cut = Math.ceil(cut / 2);
            places.push({ text: rest.slice(0, cut), x, y, index });
            x += room();
            rest = rest.slice(cut);
          }
        }
      }
    });
    return { places: places.slice(0, 600), height: Math.min(y, 1400) };
  }

  lines(box, x, y, size, color) {
    for (const place of box.places) {
      if (place.y > box.height) return;
      this.write(place.text, x + place.x, y + place.y, size, color);
    }
  }

  card({ about, now, tokens, kept, experts }, box, x, y, width, height) {
    const hue = this.color({ LoRA: "lora", DoRA: "dora", MixLoRA: "mix", MixDoRA: "mixdora" }[about.kind] || "base");
    this.pen.fillStyle = this.color("card");
    this.pen.strokeStyle = this.color("line");
    this.pen.beginPath();
    this.pen.roundRect(x, y, width, height, 16);
    this.pen.fill();
    this.pen.stroke();
    this.pen.fillStyle = hue;
    this.pen.fillRect(x + 24, y + 24, 44, 8);
    const name = now.route ? `${about.name}: ${now.route.adapter}` : about.name;
    this.write(name, x + 24, y + 64, 22, "ink", 600);
    for (const { text, x: dx, y: dy, index } of box.places) {
      if (dy > box.height) break;
      this.font(20);
      const at = [x + 24 + dx, y + 78 + dy];
      const token = tokens[index];
      const wide = this.pen.measureText(text).width;
      if (experts && token.expert !== null) {
        const ink = this.color("e" + (token.expert % 8));
        this.pen.fillStyle = ink;
        this.pen.globalAlpha = 0.16;
        this.pen.fillRect(at[0], at[1] - 18, wide, 25);
        this.pen.globalAlpha = 1;
        if (text.trim() && token.t.trimStart().startsWith(text)) {
          this.font(10, 700, "monospace");
          this.pen.fillText(letterOf(token.expert), at[0], at[1] - 19);
        }
      }
      const differs = kept && !kept.has(index);
      this.write(text, ...at, 20, differs || !kept ? "ink" : "soft");
      if (differs) {
        this.pen.fillStyle = hue;
        this.pen.fillRect(at[0], at[1] + 6, wide, 2);
      }
    }
    const facts = now.error ? now.error.slice(0, 60) : `${now.tokens} token${now.tokens === 1 ? "" : "s"} · ${digits(now.rate, 1)} tokens/s`;
    const own = settingWords(now.sampling || {});
    if (own) this.write(own, x + 24, y + height - 50, 15, "ink");
    this.write(facts, x + 24, y + height - 24, 17, now.error ? "bad" : "soft");
  }

  save(name) {
    this.canvas.toBlob((blob) => minilora.save(name, blob), "image/png");
  }
}
