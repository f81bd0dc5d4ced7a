// One token: its probability, the alternatives, and the experts layer by layer, in a box beside the token.

class Inspector {
  constructor(box, close) {
    this.box = box;
    this.shown = "";
    box.querySelector(".ml-close").addEventListener("click", close);
  }

  clear() {
    this.shown = "";
    this.box.hidden = true;
    this.box.querySelector(".ml-inspected").replaceChildren();
  }

  // answer and base: `Answer`s; at: index of the token; same: whether all tokens before it are equal; anchor: its element.
  paint(answer, base, at, same, anchor) {
    const token = answer.tokens[at];
    const other = answer !== base && same ? base.tokens[at] : null;
    const signature = `${answer.about.name} ${at} ${other ? other.i : ""}`;
    if (signature === this.shown) return;
    this.shown = signature;
    this.box.hidden = false;
    const title = make("p", "ml-inspected-title");
    title.append(make("code", "ml-piece", visible(token.t || token.p || "")), this.words(answer, token, at));
    const parts = [title];
    if (token.a) {
      const lists = make("div", "ml-choices");
      lists.append(this.choices(answer.about.name, token));
      if (other && other.a) lists.append(this.choices(`${base.about.name}, after the same text`, other));
      parts.push(lists);
    }
    if (token.r) parts.push(this.routing(token.r));
    this.box.querySelector(".ml-inspected").replaceChildren(...parts);
    this.place(anchor);
  }

  // Below the token, or above it, or else beside it, wherever all of the box is in view. (A phone has a sheet instead.)
  place(anchor) {
    const token = anchor.getBoundingClientRect();
    const stage = this.box.parentElement.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.box;
    let left = Math.min(token.left - 20, stage.right - width);
    let top = token.bottom + 10;
    if (top + height > innerHeight) {
      top = token.top - 14 - height;
      if (top < 0) {
        top = Math.max(0, innerHeight - height - 8);
        left = token.right + 16 + width <= stage.right ? token.right + 16 : token.left - 16 - width;
      }
    }
    this.box.style.left = Math.max(0, left - stage.left) + "px";
    this.box.style.top = top - stage.top + "px";
  }

  words(answer, token, at) {
    const facts = [`token ${at + 1} of ${answer.about.name}`];
    if (token.l !== undefined && token.l !== null) {
      facts.push(`probability ${percent(Math.exp(token.l))}`, `log-probability ${digits(token.l, 3)}`);
    }
    return make("span", "ml-inspected-words", facts.join(" · "));
  }

  choices(title, token) {
    const box = make("div", "ml-choice-box");
    const list = make("ol", "ml-choice-list");
    box.append(make("h4", "", title), list);
    const chosen = token.p === undefined ? token.t : token.p;
    for (const [text, logprob] of token.a) {
      const share = Math.exp(logprob);
      const line = make("li", text === chosen ? "ml-picked" : "");
      line.style.setProperty("--w", share.toFixed(4));
      line.append(make("code", "", visible(text)), make("span", "ml-probability", percent(share)));
      if (text === chosen) line.append(make("span", "ml-unseen", " (chosen)"));
      list.append(line);
    }
    return box;
  }

  routing(layers) {
    const box = make("div", "ml-routing");
    box.append(make("h4", "", "Routing weights, layer by layer"));
    const list = make("ol", "ml-layers");
    layers.forEach((layer, at) => {
      const line = make("li");
      line.append(make("span", "ml-layer-number", String(at + 1)));
      const bar = make("span", "ml-layer-bar");
      for (let i = 0; i < layer.length; i += 2) {
        const share = layer[i + 1] / 1000;
        const part = make("span", "ml-layer-part", `${letterOf(layer[i])} ${percent(share)}`);
        part.style.setProperty("--e", hueOf(layer[i]));
        part.style.flexGrow = share;
        bar.append(part);
      }
      line.append(bar);
      list.append(line);
    });
    box.append(list);
    return box;
  }
}
