// The inspector: a network drawn as it is, what each of its layers gives, and, with a model behind it, questions to it.
// One custom element, the same in a report, in the browser and in a notebook. Nothing here is loaded from another host.
(() => {
  "use strict";
  if (customElements.get("probekit-inspector")) return;

  const DEBOUNCE = 150; // ms from a change of the question to asking it
  const GRID = 16; // cells of a mask, each way
  const MANY = 24; // layers of a stack from which on they are drawn small
  const FEW = 3; // pairs of a factor below which no role can be told

  // --- small things ----------------------------------------------------------------------------------------------------

  /** An element. Children that are strings become text, never markup. */
  function h(tag, props, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(props || {})) {
      if (value === null || value === undefined || (value === false && !(key in element))) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (key === "style") element.style.cssText = value;
      else if (key in element && key !== "list" && !key.includes("-")) element[key] = value;
      else element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  function svg(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  const percent = (x) => `${Math.round(100 * x)}\u00a0%`;
  /** A window of the steps as text: 25%-50% becomes 25–50 %. */
  const windowText = (window) => (window.includes("%") ? `${window.replaceAll("%", "").replace("-", "–")}\u00a0%` : window);
  const number = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  function listed(parts, last = "and") {
    return parts.length < 2 ? parts.join("") : `${parts.slice(0, -1).join(", ")} ${last} ${parts.at(-1)}`;
  }

  /** The values of a response of JSON lines, as they come. */
  async function* linesOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) if (part.trim()) yield JSON.parse(part);
    }
    if (rest.trim()) yield JSON.parse(rest);
  }

  /** An image that keeps its place while it has no picture. */
  function setPicture(image, url, alt) {
    if (url) {
      if (image.getAttribute("src") !== url) image.src = url;
      image.alt = alt;
    } else {
      image.removeAttribute("src");
      image.alt = "";
    }
  }

  const picture = (props) => h("img", { draggable: false, alt: "", ...props });

  // --- the network -----------------------------------------------------------------------------------------------------

  const BLOCK = /^(?:(down|up)_blocks\.(\d+)|mid_block)(?=\.|$)/;
  const KINDS = {
    query: "queries",
    key: "keys",
    value: "values",
    mid: "the whole middle block",
    block: "a whole block",
    resnet: "a residual block of convolutions",
    attention: "an attention block",
    conv: "a convolution",
    sampler: "a change of resolution",
    projection: "a projection",
    text: "a part of the text encoder",
  };

  /** A drawn network: tiles to choose from. `choose(names, {add, stream})` is called for every choice. */
  class Network {
    constructor({ form, layers, shown, choose, clear, caption, text = true }) {
      this.layers = layers;
      this.byName = new Map(layers.map((layer) => [layer.name, layer]));
      this.shown = new Set(shown);
      this.choose = choose;
      this.clear = clear;
      this.text = text; // whether what is in the lane of the text can be chosen
      this.caption = caption;
      this.tiles = new Map();
      this.lanes = new Map();
      this.root = h("div", { class: `pi-net pi-${form}`, role: "group", "aria-label": "the network's layers" });
      this.inside = new Map();
      for (const layer of layers) {
        if (layer.inside && this.byName.has(layer.inside)) {
          this.inside.set(layer.inside, [...(this.inside.get(layer.inside) || []), layer]);
        }
      }
      const own = layers.filter((layer) => !(layer.inside && this.byName.has(layer.inside)));
      const encoders = own.filter((layer) => layer.part === "text");
      const body = own.filter((layer) => layer.part !== "text");
      if (encoders.length) this.root.append(this.drawEncoders(encoders));
      this.root.append(form === "u" ? this.drawU(body) : this.drawStack(body, form === "lanes"));
      this.root.addEventListener("keydown", (event) => this.onKey(event));
      this.listenToDrags();
      const first = this.tiles.get(shown[0]) || this.tiles.values().next().value;
      if (first) first.button.tabIndex = 0;
    }

    // .. tiles

    tile(layer, label, minor = false) {
      const image = picture();
      const button = h(
        "button",
        {
          type: "button",
          class: `pi-tile${minor ? " pi-minor" : ""}`,
          "data-layer": layer.name,
          "aria-pressed": "false",
          tabIndex: -1,
          onclick: (event) => this.choose([layer.name], { add: event.shiftKey || event.ctrlKey || event.metaKey }),
        },
        h("span", { class: "pi-pic" }, image),
        h("span", { class: "pi-label" }, label),
      );
      button.addEventListener("focus", () => this.enter(button));
      this.tiles.set(layer.name, { button, image, layer });
      this.tell({ button, layer }, "");
      return button;
    }

    enter(button) {
      for (const each of this.buttons()) each.tabIndex = each === button ? 0 : -1;
    }

    buttons() {
      return [...this.root.querySelectorAll(".pi-tile")];
    }

    tell({ button, layer }, says, stream = "") {
      const kind = stream ? `its ${stream} stream` : KINDS[layer.kind] || layer.kind;
      button.title = [layer.name, kind, says].filter(Boolean).join("\n");
      button.setAttribute("aria-label", [layer.short + (stream ? `, its ${stream}` : ""), says].filter(Boolean).join(": "));
    }

    /** A button that unfolds a panel. */
    unfold(name, panel, what) {
      const button = h("button", {
        type: "button",
        class: "pi-unfold",
        "aria-expanded": "false",
        "aria-label": what,
        title: what,
        onclick: () => {
          const open = button.getAttribute("aria-expanded") !== "true";
          button.setAttribute("aria-expanded", String(open));
          panel.hidden = !open;
          this.drawLines?.();
        },
      });
      button.panelOf = panel;
      return button;
    }

    /** A layer with the disclosure of what lies inside it; the panel goes into `panels`. */
    cell(layer, label, panels, minor = false) {
      const parts = this.inside.get(layer.name) || [];
      const tile = this.tile(layer, label, minor);
      if (!parts.length) return h("div", { class: "pi-cell" }, tile);
      const panel = this.panel(parts, `inside ${layer.short}`, layer);
      panels.append(panel);
      return h("div", { class: "pi-cell" }, tile, this.unfold(layer.name, panel, `what lies inside ${layer.short}`));
    }

    panel(parts, title, around) {
      const nested = h("div", { class: "pi-panels" });
      const own = parts.map((layer) => within(layer.short, around.short));
      const block = /^block \d+(?= |$)/.exec(own[0])?.[0];
      const shared = block && own.every((each) => each === block || each.startsWith(`${block} `)) ? block : "";
      const label = (layer) => within(within(layer.short, around.short), shared).replace(/ to ([qkv])$/, " $1");
      const tiles = parts.map((layer) => this.cell(layer, label(layer), nested, true));
      return h("div", { class: "pi-panel", hidden: true }, h("p", { class: "pi-small" }, title), h("div", { class: "pi-tiles" }, tiles), nested);
    }

    // .. forms

    drawEncoders(layers) {
      const panels = h("div", { class: "pi-panels" });
      const tiles = layers.map((layer) => this.cell(layer, layer.short.replace(/text (encoder( \d)?).*?(\d+)$/, "$1 $3"), panels, true));
      return h(
        "details",
        { class: "pi-encoders", ontoggle: () => this.drawLines?.() },
        h("summary", null, `text encoder, ${plural(layers.length, "layer")}`),
        h("div", { class: "pi-tiles" }, tiles),
        panels,
      );
    }

    /** One of a U-Net's blocks: its layers as tiles, the rest folded. */
    drawBlock(key, layers) {
      const match = BLOCK.exec(key);
      const title = match ? (match[1] ? `${match[1]} ${match[2]}` : "middle") : null;
      const prefix = layers[0].short.replace(/^(down \d+|up \d+|mid).*/, "$1");
      const label = (layer) => (title === null ? layer.short : layer.name === key ? "whole block" : within(layer.short, prefix));
      const panels = h("div", { class: "pi-panels" });
      const shown = layers.filter((layer) => this.shown.has(layer.name));
      const rest = layers.filter((layer) => !this.shown.has(layer.name));
      const block = h("div", { class: `pi-block${title === null ? " pi-end" : ""}`, "data-block": key });
      const tiles = (title === null ? layers : shown).map((layer) => this.cell(layer, label(layer), panels, title === null));
      if (title !== null) {
        const head = h("div", { class: "pi-head" }, h("span", null, title));
        if (rest.length) {
          const panel = h(
            "div",
            { class: "pi-panel", hidden: !!shown.length },
            h("div", { class: "pi-tiles" }, rest.map((layer) => this.cell(layer, label(layer), panels, true))),
          );
          panels.prepend(panel);
          if (shown.length) head.append(this.unfold(key, panel, `the other layers of ${title}`));
        }
        block.append(head);
      }
      const columns = tiles.length > 4 ? Math.ceil(tiles.length / 2) : tiles.length;
      block.append(h("div", { class: "pi-tiles", style: `--columns:${columns}` }, tiles), panels);
      return block;
    }

    drawU(layers) {
      const blocks = new Map();
      for (const layer of layers) {
        const key = BLOCK.exec(layer.name)?.[0] || layer.name;
        blocks.set(key, [...(blocks.get(key) || []), layer]);
      }
      const levels = new Map();
      for (const [key, own] of blocks) {
        const { part } = own[0];
        const level = BLOCK.test(key) ? own[0].level : -1; // conv_in and conv_out stand above
        const row = levels.get(level) || { encoder: [], middle: [], decoder: [] };
        (row[part] || row.encoder).push(this.drawBlock(key, own));
        levels.set(level, row);
      }
      const lines = svg("svg", { class: "pi-lines", "aria-hidden": "true" });
      const body = h("div", { class: "pi-body" }, lines);
      const rows = [...levels].sort(([a], [b]) => a - b).map(([level, row], index) => {
        const drawn = row.middle.length
          ? h("div", { class: "pi-level pi-bottom" }, h("div", { class: "pi-side" }, row.middle))
          : h("div", { class: "pi-level" }, h("div", { class: "pi-side pi-encoder" }, row.encoder), h("div", { class: "pi-side pi-decoder" }, row.decoder));
        drawn.style.setProperty("--level", Math.min(index, 6));
        body.append(drawn);
        return drawn;
      });
      this.drawLines = () => drawFlow(lines, body, rows);
      this.watch = new ResizeObserver(() => this.drawLines());
      this.watch.observe(body);
      return body;
    }

    drawStack(layers, two) {
      let carried = false;
      const cells = layers.map((layer) => {
        const panels = h("div", { class: "pi-panels" });
        const textOnly = two && layer.streams.length === 1 && layer.streams[0] === "text";
        const cell = this.cell(layer, layer.short.replace("single block", "single"), panels, !this.shown.has(layer.name));
        const row = h("div", { class: "pi-row" }, cell);
        if (two && layer.streams.includes("text") && !textOnly && !this.text) {
          row.append(h("span", { class: "pi-joint", "aria-hidden": "true" }), h("span", { class: "pi-stop", "aria-hidden": "true" }));
          carried = true;
        } else if (two && layer.streams.includes("text") && !textOnly) {
          const image = picture();
          const lane = h(
            "button",
            {
              type: "button",
              class: "pi-tile pi-lane",
              tabIndex: -1,
              "data-lane": layer.name,
              "aria-pressed": "false",
              onclick: (event) => this.choose([layer.name], { add: event.shiftKey || event.ctrlKey || event.metaKey, stream: "text" }),
            },
            h("span", { class: "pi-pic" }, image),
            h("span", { class: "pi-label" }, "its text"),
          );
          lane.addEventListener("focus", () => this.enter(lane));
          this.lanes.set(layer.name, { button: lane, image, layer });
          carried = true;
          row.append(h("span", { class: "pi-joint", "aria-hidden": "true" }), lane);
        } else if (carried && this.shown.has(layer.name)) {
          row.append(h("span", { class: "pi-elbow", "aria-hidden": "true" })); // the text goes in and no further
          carried = false;
        }
        if (textOnly) row.classList.add("pi-textonly");
        const kind = `pi-block${this.shown.has(layer.name) ? "" : " pi-end"}${carried ? " pi-carries" : ""}`;
        return h("div", { class: kind, "data-block": layer.name }, row, panels);
      });
      const many = cells.length > MANY;
      const body = h("div", { class: `pi-body pi-stack${many ? " pi-many" : ""}` });
      let columns = 0;
      const arrange = () => {
        const fit = Math.max(1, Math.floor(body.clientWidth / ((two ? 210 : 110) * (many ? 0.75 : 1))));
        const wanted = Math.max(1, Math.min(fit, Math.ceil((cells.length - 2) / 10)));
        if (wanted === columns) return;
        columns = wanted;
        const each = Math.ceil(cells.length / columns);
        const focused = document.activeElement;
        body.replaceChildren(
          ...Array.from({ length: columns }, (_, k) =>
            h("div", { class: "pi-run" }, two && h("div", { class: "pi-names", "aria-hidden": "true" }, h("span", null, "image"), h("span", null, "text")), cells.slice(k * each, (k + 1) * each)),
          ),
        );
        if (body.contains(focused)) focused.focus();
      };
      arrange();
      this.watch = new ResizeObserver(arrange);
      this.watch.observe(body);
      return body;
    }

    // .. what it shows

    /** `of(name, stream)` gives {picture, colour, says, stale} or null; stream is `text` in the lane of the text. */
    show(of) {
      for (const [stream, tiles] of [[null, this.tiles], ["text", this.lanes]]) {
        for (const [name, tile] of tiles) {
          const told = of(name, stream) || {};
          setPicture(tile.image, told.picture, this.caption(tile.layer, stream));
          tile.button.classList.toggle("pi-stale", !!told.stale);
          tile.button.classList.toggle("pi-role", !!told.colour);
          tile.button.style.setProperty("--c", told.colour || "transparent");
          this.tell(tile, told.says || "", stream || "");
        }
      }
    }

    mark(names, stream = null) {
      const chosen = new Set(names);
      for (const [name, { button }] of this.tiles) button.setAttribute("aria-pressed", String(chosen.has(name) && !(stream === "text" && this.lanes.has(name))));
      for (const [name, { button }] of this.lanes) button.setAttribute("aria-pressed", String(chosen.has(name) && (stream === "text" || stream === "both")));
      for (const name of names) this.reveal(name);
    }

    /** Unfold what a chosen layer is folded in. */
    reveal(name) {
      const found = this.tiles.get(name);
      if (!found) return;
      for (let element = found.button.parentElement; element && element !== this.root; element = element.parentElement) {
        if (element.tagName === "DETAILS") element.open = true;
        if (element.classList.contains("pi-panel") && element.hidden) {
          const block = element.closest(".pi-block, .pi-encoders");
          const opener = [...block.querySelectorAll(".pi-unfold")].find((each) => each.panelOf === element);
          element.hidden = false;
          opener?.setAttribute("aria-expanded", "true");
        }
      }
    }

    // .. keyboard and mouse

    onKey(event) {
      if (!event.target.matches(".pi-tile")) return;
      const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (event.key in arrows) {
        event.preventDefault();
        this.step(event.target, ...arrows[event.key]);
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        const name = event.target.dataset.layer || event.target.dataset.lane;
        this.choose([name], { add: event.shiftKey || event.ctrlKey, stream: event.target.dataset.lane ? "text" : undefined });
      } else if (event.key === "Escape") {
        event.preventDefault();
        this.clear();
      }
    }

    /** Move the focus to the nearest tile in a direction. */
    step(from, dx, dy) {
      const here = middle(from);
      let best = null;
      for (const button of this.buttons()) {
        if (button === from || !button.offsetParent) continue;
        const there = middle(button);
        const [x, y] = [there.x - here.x, there.y - here.y];
        const along = x * dx + y * dy;
        const across = Math.abs(x * dy) + Math.abs(y * dx);
        if (along < 4) continue;
        const far = dx ? along + 4 * across : 4 * along + across; // the same row, or the next
        if (!best || far < best.far) best = { button, far };
      }
      best?.button.focus();
    }

    /** Dragging over a block chooses all of its tiles. A finger scrolls instead. */
    listenToDrags() {
      let start = null;
      const band = h("div", { class: "pi-band", hidden: true });
      this.root.append(band);
      const touched = (event) => {
        const box = { left: Math.min(start.x, event.clientX), right: Math.max(start.x, event.clientX), top: Math.min(start.y, event.clientY), bottom: Math.max(start.y, event.clientY) };
        const blocks = [...this.root.querySelectorAll(".pi-block")].filter((block) => {
          const of = block.getBoundingClientRect();
          return of.left < box.right && of.right > box.left && of.top < box.bottom && of.bottom > box.top;
        });
        return { box, blocks };
      };
      const move = (event) => {
        if (!start.moved && Math.hypot(event.clientX - start.x, event.clientY - start.y) < 8) return;
        start.moved = true;
        const { box, blocks } = touched(event);
        const root = this.root.getBoundingClientRect();
        band.hidden = false;
        band.style.cssText = `left:${box.left - root.left}px;top:${box.top - root.top}px;width:${box.right - box.left}px;height:${box.bottom - box.top}px`;
        for (const block of this.root.querySelectorAll(".pi-block")) block.classList.toggle("pi-touched", blocks.includes(block));
      };
      const end = (event) => {
        window.removeEventListener("pointermove", move);
        window.removeEventListener("pointerup", end);
        window.removeEventListener("pointercancel", end);
        const { moved } = start;
        const names = moved && event.type === "pointerup"
          ? touched(event).blocks.flatMap((block) => {
              const own = [...block.querySelectorAll(".pi-tile")].map((tile) => tile.dataset.layer);
              const shown = own.filter((name) => this.shown.has(name));
              return shown.length ? shown : own.slice(0, 1);
            })
          : [];
        start = null;
        band.hidden = true;
        for (const block of this.root.querySelectorAll(".pi-touched")) block.classList.remove("pi-touched");
        if (!moved) return;
        const swallow = (click) => { click.stopPropagation(); click.preventDefault(); };
        window.addEventListener("click", swallow, { capture: true, once: true });
        setTimeout(() => window.removeEventListener("click", swallow, { capture: true }), 0);
        if (names.length) this.choose(names, { add: event.shiftKey || event.ctrlKey });
      };
      this.root.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "touch" || event.button !== 0 || start) return;
        start = { x: event.clientX, y: event.clientY, moved: false };
        window.addEventListener("pointermove", move);
        window.addEventListener("pointerup", end);
        window.addEventListener("pointercancel", end);
      });
    }
  }

  function within(short, around) {
    return short.startsWith(`${around} `) ? short.slice(around.length + 1) : short;
  }

  function middle(element) {
    const box = element.getBoundingClientRect();
    return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
  }

  /** The lines of a U: down the encoder, through the middle, up the decoder; a dashed skip at every level. */
  function drawFlow(lines, body, rows) {
    const origin = body.getBoundingClientRect();
    if (!origin.width) return;
    lines.setAttribute("width", origin.width);
    lines.setAttribute("height", origin.height);
    lines.replaceChildren();
    const box = (element) => {
      const of = element.getBoundingClientRect();
      const [left, top] = [of.left - origin.left, of.top - origin.top];
      return { left, top, right: left + of.width, bottom: top + of.height, x: left + of.width / 2, y: top + of.height / 2 };
    };
    const line = (path, kind) => lines.append(svg("path", { d: path, class: `pi-${kind}` }));
    const arrow = (x, y, dx, dy) => line(`M${x - 4 * dx - 4 * dy} ${y - 4 * dy - 4 * dx}L${x} ${y}L${x - 4 * dx + 4 * dy} ${y - 4 * dy + 4 * dx}`, "flow");
    const sides = rows.map((row) => {
      const of = (side) => [...row.querySelectorAll(`:scope > .${side} > .pi-block`)].map(box);
      return { encoder: of("pi-encoder"), decoder: of("pi-decoder"), middle: row.classList.contains("pi-bottom") ? of("pi-side") : [], ends: !!row.querySelector(".pi-end") };
    });
    let before = null;
    let after = null;
    for (const { encoder, decoder, middle: bottom, ends } of sides) {
      const [first, last] = [encoder, decoder].map((blocks) => around(blocks));
      if (first && last && !ends && last.left - first.right > 12) {
        line(`M${first.right + 3} ${first.y}H${last.left - 4}`, "skip");
        arrow(last.left - 3, first.y, 1, 0);
      }
      const bottomBox = around(bottom);
      if (before && (first || bottomBox)) {
        const to = first || bottomBox;
        const x = first ? Math.max(before.left + 14, to.left + 14) : before.left + 14;
        if (first) { line(`M${x} ${before.bottom + 1}V${to.top - 2}`, "flow"); arrow(x, to.top - 2, 0, 1); }
        else { line(`M${x} ${before.bottom + 1}V${to.y}H${to.left - 3}`, "flow"); arrow(to.left - 3, to.y, 1, 0); }
      }
      if (after && (last || bottomBox)) {
        if (last) { const x = Math.min(after.right, last.right) - 14; line(`M${x} ${last.top - 2}V${after.bottom + 3}`, "flow"); arrow(x, after.bottom + 3, 0, -1); }
        else { const x = after.right - 14; line(`M${bottomBox.right + 3} ${bottomBox.y}H${x}V${after.bottom + 3}`, "flow"); arrow(x, after.bottom + 3, 0, -1); }
      }
      before = first || before;
      after = last || after;
    }
  }

  function around(boxes) {
    if (!boxes.length) return null;
    const [left, top] = [Math.min(...boxes.map((b) => b.left)), Math.min(...boxes.map((b) => b.top))];
    const [right, bottom] = [Math.max(...boxes.map((b) => b.right)), Math.max(...boxes.map((b) => b.bottom))];
    return { left, top, right, bottom, x: (left + right) / 2, y: (top + bottom) / 2 };
  }

  // --- what several views share ----------------------------------------------------------------------------------------

  function legend(colours, names, extra = null) {
    return h(
      "p",
      { class: "pi-legend" },
      names.filter((name) => colours[name]).map((name) => h("span", null, h("i", { style: `background:${colours[name]}` }), name)),
      extra && h("span", { class: "pi-soft" }, extra),
    );
  }

  function triptych() {
    const images = { O: picture(), R: picture(), E: picture() };
    const names = { O: h("figcaption", null, "O"), R: h("figcaption", null, ""), E: h("figcaption", null, "E") };
    const figure = (which) => h("figure", { class: `pi-${which === "R" ? "result" : "end"}` }, h("span", { class: "pi-frame" }, images[which]), names[which]);
    return { images, names, root: h("div", { class: "pi-three" }, figure("O"), figure("R"), figure("E")) };
  }

  /** A map of layers by windows of the steps, each cell a small picture. */
  function timeMap({ layers, windows, of, choose, chosen }) {
    const head = h("tr", null, h("th", { scope: "col" }, "steps"), layers.map((layer) => h("th", { scope: "col", class: "pi-tilt" }, h("span", null, layer.short))));
    const rows = windows.map((window) =>
      h(
        "tr",
        null,
        h("th", { scope: "row" }, windowText(window)),
        layers.map((layer) => {
          const told = of(window, layer.name) || {};
          const image = picture();
          setPicture(image, told.picture, `O with ${layer.short} taken from E at steps ${windowText(window)}`);
          return h(
            "td",
            null,
            h(
              "button",
              {
                type: "button",
                class: `pi-mini${told.colour ? " pi-role" : ""}`,
                style: told.colour ? `--c:${told.colour}` : "",
                title: `${layer.name} at steps ${windowText(window)}${told.says ? `: ${told.says}` : ""}`,
                "aria-label": `${layer.short} at steps ${windowText(window)}`,
                "aria-pressed": String(chosen(window, layer.name)),
                "data-map": layer.name,
                "data-window": window,
                onclick: () => choose(window, layer.name),
              },
              image,
            ),
          );
        }),
      ),
    );
    return h("div", { class: "pi-scroll" }, h("table", { class: "pi-map" }, h("thead", null, head), h("tbody", null, rows)));
  }

  // --- a finished run --------------------------------------------------------------------------------------------------

  class RunView {
    constructor(run, { onChoose = () => {}, onPair = () => {}, ask = null } = {}) {
      this.run = run;
      this.onChoose = onChoose;
      this.onPair = onPair;
      this.pair = 0;
      this.window = run.windows[0];
      this.chosen = null;
      this.root = h("div", { class: "pi-view" });
      this.ask = ask;
      if (run.lazy) {
        this.root.append(h("p", { class: "pi-soft", role: "status" }, "fetching the run's pictures …"));
        this.fetch();
      } else this.build();
    }

    async fetch() {
      try {
        const response = await fetch(this.run.lazy);
        const told = await response.json();
        if (told.error) throw new Error(told.error);
        this.run = { ...told, lazy: null };
        this.root.replaceChildren();
        this.build();
      } catch (error) {
        this.root.replaceChildren(h("p", { role: "alert", class: "pi-alert" }, `The run cannot be shown: ${error.message}`));
      }
    }

    build() {
      const { run } = this;
      this.pairSelect = h(
        "select",
        { onchange: () => { this.pair = Number(this.pairSelect.value); this.show(); this.onPair(this.run.pairs[this.pair].name); } },
        run.pairs.map((pair, k) => h("option", { value: String(k) }, pair.factor === "own" ? pair.name : `${pair.name}`)),
      );
      this.windowSelect = h(
        "select",
        { onchange: () => { this.window = this.windowSelect.value; this.show(); } },
        run.windows.map((window) => h("option", { value: window }, window === "all" ? "all steps" : `steps ${windowText(window)}`)),
      );
      this.ends = Object.fromEntries(
        ["O", "E"].map((end) => {
          const image = picture();
          const text = h("span", { class: "pi-caption" });
          return [end, { image, text, root: h("figure", { class: "pi-ask-end" }, image, h("figcaption", null, h("b", null, end), text)) }];
        }),
      );
      const ask = h(
        "section",
        { "data-part": "ask", class: "pi-pair", "aria-label": "the pair of pictures" },
        h(
          "div",
          { class: "pi-controls" },
          h("label", null, "pair ", this.pairSelect),
          run.windows.length > 1 && h("label", null, "injected at ", this.windowSelect),
          this.ask && (this.further = h("button", { type: "button", class: "pi-quiet", onclick: () => this.ask(this.run, this.run.pairs[this.pair]) }, "ask further about this pair")),
        ),
        h("div", { class: "pi-ends" }, this.ends.O.root, this.ends.E.root),
      );
      this.network = new Network({
        form: run.form,
        layers: run.layers,
        shown: run.layers.map((layer) => layer.name),
        text: false,
        choose: (names) => this.choose(names.at(-1)),
        clear: () => this.choose(null),
        caption: (layer, stream) => `O with ${stream ? `the ${stream} of ` : ""}${layer.short} taken from E`,
      });
      this.detail = h("section", { "data-part": "answer", class: "pi-answer", "aria-live": "polite", "aria-label": "the chosen layer" });
      this.time = h("section", { class: "pi-time" });
      this.root.append(
        ask,
        h(
          "div",
          { class: `pi-bench${run.form !== "u" && run.layers.length <= 9 ? " pi-slim" : ""}` },
          h(
            "section",
            { "data-part": "network", class: "pi-network", "aria-label": "the network" },
            this.network.root,
            legend(run.colours, [...run.factors, run.everything, "mixed"], `${this.frameless()}. Each picture is O with that layer taken from E.`),
          ),
          this.detail,
        ),
        this.time,
      );
      this.chosen ??= this.strongest();
      this.show();
    }

    /** What a picture without a frame says. */
    frameless() {
      const { run } = this;
      if (run.one_pair) return "No frame: nothing came over";
      return run.fewest_pairs < FEW ? "No frames: too few pairs to tell roles" : "No frame: no role";
    }

    /** The layer with which most of a factor came over, of those that have a role; else one to begin with. */
    strongest() {
      const { run, window } = this;
      const of = (name) => (run.numbers?.[window]?.[name] || []).find((row) => row.factor === this.role(window, name))?.transfer ?? -1;
      const best = run.layers.map((layer) => layer.name).reduce((a, b) => (a !== null && of(a) >= of(b) ? a : b), null);
      return best !== null && of(best) >= 0 ? best : run.layers[run.layers.length >> 1].name;
    }

    choose(name) {
      this.chosen = name;
      this.show();
      this.onChoose(name);
    }

    /** Follow another view's choice. */
    follow({ layer, pair }) {
      if (!this.network) return;
      if (layer !== undefined) this.chosen = this.network.tiles.has(layer) ? layer : null;
      const k = pair === undefined ? -1 : this.run.pairs.findIndex((each) => each.name === pair);
      if (k >= 0) { this.pair = k; this.pairSelect.value = String(k); }
      this.show();
    }

    role(window, layer) {
      return this.run.roles?.[window]?.[layer] ?? null;
    }

    show() {
      const { run } = this;
      const pair = run.pairs[this.pair];
      for (const [end, caption] of [["O", pair.original], ["E", pair.edit]]) {
        setPicture(this.ends[end].image, pair[end], `${end}: ${caption}`);
        this.ends[end].text.textContent = caption;
      }
      const told = (window, name) => {
        const role = this.role(window, name);
        return { picture: pair.pictures?.[window]?.[name], says: role || "", colour: role && role !== run.no_role ? run.colours[role] : null };
      };
      if (this.further) this.further.hidden = !!pair.given; // its pictures are files that the page does not have
      this.network.show((name, stream) => (stream ? null : told(this.window, name)));
      this.network.mark(this.chosen ? [this.chosen] : []);
      this.detail.replaceChildren(...this.details(pair));
      const windows = run.windows.filter((window) => window.includes("%"));
      if (run.windows.length > 1) {
        this.time.replaceChildren(
          h("h3", null, "Layer by time"),
          h("p", { class: "pi-soft" }, "O with a layer taken from E in a part of the steps only; 0 % is where noise becomes a picture."),
          timeMap({
            layers: run.layers,
            windows: windows.length ? windows : run.windows.slice(1),
            of: told,
            chosen: (window, name) => window === this.window && name === this.chosen,
            choose: (window, name) => { this.window = window; this.windowSelect.value = window; this.choose(name); },
          }),
        );
      }
    }

    details(pair) {
      const { run } = this;
      if (!this.chosen) return [h("p", { class: "pi-empty" }, "Choose a layer to see what came over with it.")];
      const layer = this.network.byName.get(this.chosen);
      const three = triptych();
      setPicture(three.images.O, pair.O, "O");
      setPicture(three.images.E, pair.E, "E");
      setPicture(three.images.R, pair.pictures?.[this.window]?.[layer.name], `O with ${layer.short} taken from E`);
      three.names.R.textContent = "O with it";
      const rows = run.numbers?.[this.window]?.[layer.name] || [];
      const role = this.role(this.window, layer.name);
      return [
        h("h3", null, layer.short),
        h("p", { class: "pi-name" }, h("code", null, layer.name)),
        three.root,
        rows.length ? h("p", { class: "pi-says" }, ...this.says(role, rows)) : null,
        rows.length ? this.numbers(rows) : null,
      ].filter(Boolean);
    }

    /** The role of the chosen layer in words. */
    says(role, rows) {
      const { run } = this;
      const when = this.window === "all" ? "" : ` at steps ${windowText(this.window)}`;
      const known = rows.filter((row) => row.transfer !== null);
      const came = listed(known.map((row) => `${percent(row.transfer)} of ${row.factor === "own" ? "what E differs in" : `the ${row.factor}`}`));
      const measured = came ? ` ${run.one_pair ? "Here" : "Over all pairs"}, ${came} came over${when}.` : "";
      const chip = (text, colour) => h("b", { class: "pi-chip", style: colour ? `--c:${colour}` : "" }, text);
      if (role === null) return [measured.trim()];
      if (run.one_pair) {
        const what = role === run.no_role ? ["Nothing", " came over"] : role === "mixed" ? ["A mixture", " came over"] : [sentence(role), " came over"];
        return [chip(what[0], run.colours[role]), `${what[1]} with this layer in this one pair: too few pairs to tell a role.${measured}`];
      }
      if (role === run.everything) return [chip("Everything", run.colours[role]), ` comes over with this layer: with it alone, O becomes E.${measured}`];
      if (role !== run.no_role) {
        return [chip(sentence(role), run.colours[role]), ` comes over with this layer, clearly more than the rest, and than with an unrelated picture.${measured}`];
      }
      if (run.fewest_pairs < FEW) {
        const few = run.fewest_pairs === 1 ? "one pair says" : `${run.fewest_pairs} pairs say`;
        return [chip("Role unknown"), `: too few pairs to tell. ${sentence(few)} nothing of the next; at least three of a factor are needed.${measured}`];
      }
      if (run.factors.length === 1) return [chip("No role"), ` can be told of one factor alone: there is no other to be clear of.${measured}`];
      return [chip("No role"), `: nothing comes over with this layer clearly more than the rest, or than with an unrelated picture.${measured}`];
    }

    numbers(rows) {
      const { run } = this;
      const bar = (row) => {
        const x = (value) => 2 + 96 * Math.max(0, Math.min(1, value));
        const drawn = svg("svg", { viewBox: "0 0 100 14", class: "pi-bar", "aria-hidden": "true", style: `--c:${run.colours[row.factor]}` });
        drawn.append(svg("line", { x1: 2, x2: 98, y1: 7, y2: 7, class: "pi-axis" }));
        if (row.null !== null) drawn.append(svg("line", { x1: x(row.null), x2: x(row.null), y1: 1, y2: 13, class: "pi-null" }));
        if (row.low !== null) drawn.append(svg("line", { x1: x(row.low), x2: x(row.high), y1: 7, y2: 7, class: "pi-interval" }));
        if (row.transfer !== null) drawn.append(svg("circle", { cx: x(row.transfer), cy: 7, r: 3.6, class: "pi-dot" }));
        return drawn;
      };
      const range = (low, high) => (low === null || low === undefined ? "–" : `${number(low)}–${number(high)}`);
      const head = ["factor", "", "transfer", "95% interval", "null", "damage"];
      return h(
        "details",
        { class: "pi-numbers", open: this.opened, ontoggle: (event) => { this.opened = event.target.open; } },
        h("summary", null, `numbers, by ${run.descriptor}`),
        h(
          "div",
          { class: "pi-scroll" },
          h(
            "table",
            null,
            h("thead", null, h("tr", null, head.map((text) => h("th", { scope: "col" }, text)))),
            h(
              "tbody",
              null,
              rows.map((row) =>
                h(
                  "tr",
                  null,
                  h("th", { scope: "row", class: "pi-factor", style: `--c:${run.colours[row.factor]}` }, row.factor),
                  h("td", null, bar(row)),
                  h("td", null, number(row.transfer)),
                  h("td", null, range(row.low, row.high)),
                  h("td", null, number(row.null)),
                  h("td", null, number(row.damage)),
                ),
              ),
            ),
          ),
        ),
        h("p", { class: "pi-small" }, "Transfer: 0, nothing came over; 1, all of it. Line: its interval over pairs. Tick: the null, the same with an unrelated picture. Damage: 0, a picture that is O or E; 1, one that is neither."),
      );
    }
  }

  // --- the question ----------------------------------------------------------------------------------------------------

  const CAPTION = /^a (\S+) (\S+) (\S+) at the (.+?) on a (\S+) (\S+) ground$/;

  function parseCaption(prompt, values) {
    const match = CAPTION.exec(prompt.trim());
    if (!match) return null;
    const [, size, colour, kind, place, texture, ground] = match;
    const scene = { size, colour, kind, place, texture, ground };
    return Object.entries(scene).every(([key, value]) => values[key].includes(value)) && colour !== ground ? scene : null;
  }

  const caption = (s) => `a ${s.size} ${s.colour} ${s.kind} at the ${s.place} on a ${s.texture} ${s.ground} ground`;

  /** The steps of a window such as 25%-50%, as first and last number. */
  function stepsOf(window, count) {
    const match = /^([\d.]+)%-([\d.]+)%$/.exec(window);
    if (!match) return window;
    const [low, high] = match.slice(1).map((part) => Number(part) / 100);
    const inside = Array.from({ length: count }, (_, k) => k).filter((k) => k / count >= low - 1e-9 && k / count < high - 1e-9);
    return inside.length ? rangeText(inside[0], inside.at(-1), count) : window;
  }

  function rangeText(first, last, count) {
    return first <= 0 && last >= count - 1 ? "all" : `${first}-${last}`;
  }

  function readSteps(steps, count) {
    const match = /^(\d+)(?:-(\d+))?$/.exec(steps);
    if (!match) return [0, count - 1];
    const first = Math.min(Number(match[1]), count - 1);
    return [first, Math.max(first, Math.min(Number(match[2] ?? match[1]), count - 1))];
  }

  function readMask(mask) {
    const cells = new Array(GRID * GRID).fill(false);
    const digits = /^16x16:([0-9a-f]{64})$/i.exec(mask || "")?.[1];
    if (digits) for (let k = 0; k < cells.length; k++) cells[k] = ((parseInt(digits[k >> 2], 16) >> (3 - (k & 3))) & 1) === 1;
    return cells;
  }

  function writeMask(cells) {
    if (!cells.some(Boolean)) return null;
    let digits = "";
    for (let k = 0; k < cells.length; k += 4) digits += ((cells[k] << 3) | (cells[k + 1] << 2) | (cells[k + 2] << 1) | cells[k + 3]).toString(16);
    return `16x16:${digits}`;
  }

  const STREAMS = { main: "the main path", skip: "the skip", image: "the image's tokens", text: "the text's tokens" };

  /** A stream in words, as the layers that have it name it. */
  function streamText(stream, layers) {
    if (stream !== "both") return STREAMS[stream] || stream;
    return layers.some((layer) => layer.streams.includes("image")) ? "image and text" : "main path and skip";
  }

  const OPERATIONS = {
    replace: "E's activation takes the place of O's.",
    blend: "A mix of both: 0 is O's activation, 1 is E's.",
    add: "E's activation, times this number, is added to O's.",
    bypass: "The layer is left out: it adds nothing to the picture. Nothing comes from E.",
  };

  // --- the live page ---------------------------------------------------------------------------------------------------

  class Live {
    constructor(model) {
      this.model = model;
      this.q = { ...model.question };
      this.tab = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
      this.turn = 0;
      this.pictures = new Map(); // a question without its layers -> window -> layer -> what is told of its tile
      this.latest = new Map(); // a pair -> layer -> what was told last
      this.entries = [];
      this.current = null;
      this.start = {};
      this.uploads = new Map();
      this.byName = new Map(model.layers.map((layer) => [layer.name, layer]));
      this.root = h("div", { class: "pi-view pi-live" });
      this.build();
      this.onHash = () => this.readHash() && this.restored();
      window.addEventListener("hashchange", this.onHash);
    }

    stop() {
      window.removeEventListener("hashchange", this.onHash);
      clearTimeout(this.timer);
      this.asking?.abort();
      this.sweeping?.abort();
    }

    begin() {
      this.readHash();
      const wrong = !this.alert.hidden;
      this.restored();
      this.alert.hidden = !wrong; // asking hides what was said before
    }

    restored() {
      this.showQuestion();
      this.send();
    }

    // .. the address

    readHash() {
      let text = "";
      try { text = decodeURIComponent(location.hash.slice(1)); } catch { text = "?"; }
      if (!text || text === this.written) return false;
      try {
        const told = JSON.parse(text);
        if (typeof told !== "object" || told === null || Array.isArray(told)) throw new Error();
        const odd = Object.keys(told).find((key) => !(key in this.model.question));
        if (odd !== undefined) { this.fail(`The address asks for ${JSON.stringify(odd)}, which is no part of a question.`); return false; }
        if (told.layers !== undefined && !(Array.isArray(told.layers) && told.layers.every((name) => typeof name === "string"))) throw new Error();
        if (told.steps !== undefined && typeof told.steps !== "string") throw new Error();
        for (const key of ["prompt_original", "prompt_edit"]) if (told[key] !== undefined && typeof told[key] !== "string") throw new Error();
        this.q = { ...this.model.question, ...told };
        return true;
      } catch {
        this.fail("The address holds no question: what stands behind # is not one.");
        return false;
      }
    }

    hashOf(q) {
      const differ = Object.fromEntries(Object.entries(q).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(this.model.question[key])));
      return Object.keys(differ).length ? JSON.stringify(differ) : "";
    }

    writeHash() {
      this.written = this.hashOf(this.q);
      try {
        history.replaceState(null, "", this.written ? `#${encodeURIComponent(this.written)}` : location.pathname + location.search);
      } catch { /* a page inside a notebook has no address of its own */ }
    }

    // .. the page

    build() {
      this.alert = h("p", { role: "alert", class: "pi-alert", hidden: true });
      this.root.append(this.alert, this.buildAsk());
      this.network = new Network({
        form: this.model.form,
        layers: this.model.layers,
        shown: this.model.default_layers,
        choose: (names, how) => this.choose(names, how),
        clear: () => this.choose([], {}),
        caption: (layer, stream) => `O with ${stream ? `the ${stream} of ` : ""}${layer.short} taken from E`,
      });
      this.time = h("div", { class: "pi-time", hidden: true });
      const net = h(
        "section",
        { "data-part": "network", class: "pi-network", "aria-label": "the network" },
        this.buildSweep(),
        this.sweepSays,
        this.network.root,
        this.model.factors
          ? legend(this.model.colours, [...Object.keys(this.model.factors), "everything", "mixed"], "no frame: nothing came over")
          : h("p", { class: "pi-small" }, "The darker a swept layer's frame, the nearer its picture is to E, by LPIPS."),
        h("p", { class: "pi-small pi-keys" }, "Click a layer to take it from E; Shift adds one; dragging over a block takes all of it. Arrows move, Enter asks, Esc clears."),
      );
      const slim = this.model.form !== "u" && this.model.default_layers.length <= 9;
      this.root.append(h("div", { class: `pi-bench${slim ? " pi-slim" : ""}` }, net, h("div", { class: "pi-aside" }, this.buildAnswer(), this.buildHow())), this.time, this.buildStrip());
    }

    buildAsk() {
      this.cards = {};
      const cards = ["original", "edit"].map((side) => this.buildCard(side));
      const field = (label, key, props) => {
        const input = h("input", { type: "number", ...props, onchange: () => this.number(key, input) });
        this.fields[key] = input;
        return h("label", null, label, " ", input);
      };
      this.fields = {};
      this.inversion = h("select", { onchange: () => this.change({ inversion: this.inversion.value }) }, this.model.inversions.map((name) => h("option", { value: name }, name)));
      this.inversionLabel = h("label", { hidden: true }, "inversion ", this.inversion);
      return h(
        "section",
        { "data-part": "ask", class: "pi-ask", "aria-label": "the two pictures" },
        h("div", { class: "pi-cards" }, cards),
        h(
          "div",
          { class: "pi-controls" },
          field("steps", "num_steps", { min: 1, max: 1000, step: 1 }),
          field("guidance", "guidance", { min: 0, step: "any", placeholder: "own" }),
          field("seed", "seed", { min: 0, max: 4294967295, step: 1 }),
          this.inversionLabel,
        ),
      );
    }

    buildCard(side) {
      const end = side === "original" ? "O" : "E";
      const key = `prompt_${side}`;
      const { values, factors } = this.model;
      const card = { free: !values, menus: {} };
      card.image = picture();
      const factorOf = (attribute) => Object.entries(factors || {}).find(([, own]) => own.includes(attribute))?.[0];
      if (values) {
        const menu = (attribute) => {
          const select = h(
            "select",
            { "aria-label": `${attribute} of ${end}`, "data-attribute": attribute, style: `--c:${this.model.colours[factorOf(attribute)] || "currentColor"}`, onchange: () => this.setScene(side, attribute, select.value) },
            values[attribute].map((value) => h("option", { value }, value)),
          );
          card.menus[attribute] = select;
          return select;
        };
        card.scene = h("p", { class: "pi-scene" }, "a ", menu("size"), " ", menu("colour"), " ", menu("kind"), " at the ", menu("place"), " on a ", menu("texture"), " ", menu("ground"), " ground");
      }
      card.text = h("textarea", { rows: 2, spellcheck: false, "aria-label": `caption of ${end}`, oninput: () => this.change({ [key]: card.text.value.replace(/\s*\n\s*/g, " ") }) });
      card.toggle = values && h("button", { type: "button", class: "pi-quiet", onclick: () => { card.free = !card.free; this.showCards(); (card.free ? card.text : card.menus.size).focus(); } });
      card.file = h("input", { type: "file", accept: "image/*", hidden: true, onchange: () => { const [file] = card.file.files; if (file) this.upload(side, file); card.file.value = ""; } });
      const uploads = this.model.inversions.length > 0;
      card.pick = uploads && h("button", { type: "button", class: "pi-quiet", onclick: () => card.file.click() }, "give a picture");
      card.given = h("span", { class: "pi-given", hidden: true });
      card.noise = h("input", { type: "number", min: 0, max: 4294967295, step: 1, "aria-label": `noise number of ${end}`, onchange: () => this.number(side === "original" ? "noise" : "noise_edit", card.noise) });
      if (side === "edit") {
        card.same = h("input", { type: "checkbox", onchange: () => this.change({ noise_edit: card.same.checked ? null : this.q.noise + 1 }) });
        card.noiseLabel = h("span", { class: "pi-noise" }, h("label", null, card.same, " O's noise"), h("label", null, " noise ", card.noise));
      } else card.noiseLabel = h("label", { class: "pi-noise" }, "noise ", card.noise);
      card.root = h(
        "div",
        { class: "pi-card", "data-end": end },
        h("div", { class: "pi-thumb" }, card.image),
        h(
          "div",
          { class: "pi-words" },
          h("h3", null, end, h("small", null, end === "O" ? "the picture that is changed" : "the picture that layers are taken from")),
          card.scene,
          card.text,
          h("div", { class: "pi-tools" }, card.toggle, card.pick, card.file, card.given, card.noiseLabel),
        ),
      );
      if (uploads) {
        card.root.addEventListener("dragover", (event) => { event.preventDefault(); card.root.classList.add("pi-drop"); });
        card.root.addEventListener("dragleave", () => card.root.classList.remove("pi-drop"));
        card.root.addEventListener("drop", (event) => {
          event.preventDefault();
          card.root.classList.remove("pi-drop");
          const [file] = event.dataTransfer.files;
          if (file) this.upload(side, file);
        });
      }
      this.cards[side] = card;
      return card.root;
    }

    buildSweep() {
      this.byTime = h("input", { type: "checkbox" });
      this.sweepButton = h("button", { type: "button", class: "pi-main", onclick: () => this.sweep() }, "Sweep this pair");
      this.stopButton = h("button", { type: "button", hidden: true, onclick: () => this.post("stop", { tab: this.tab }) }, "Stop");
      this.progress = h("progress", { hidden: true, max: 1, value: 0, "aria-label": "layers swept" });
      this.sweepSays = h("p", { class: "pi-small pi-swept", role: "status" });
      return h(
        "div",
        { class: "pi-sweep" },
        h("h3", null, this.model.name),
        h("span", { class: "pi-grow" }),
        h("label", null, this.byTime, " by time"),
        this.sweepButton,
        this.stopButton,
        this.progress,
      );
    }

    buildAnswer() {
      this.three = triptych();
      this.three.images.R.setAttribute("data-answer", "");
      this.asked = h("p", { class: "pi-asked" });
      this.status = h("p", { class: "pi-status", role: "status" });
      this.painted = h("progress", { class: "pi-painted", max: 1, value: 0, "aria-label": "steps made" });
      this.says = h("p", { class: "pi-says", "aria-live": "polite" });
      this.numbersAt = h("div");
      const action = (name, run) => h("button", { type: "button", onclick: run }, name);
      this.actions = h(
        "div",
        { class: "pi-actions" },
        action("copy as command", () => this.copy(this.current.answer.command)),
        action("copy as Python", () => this.copy(this.current.answer.python)),
        action("copy as link", () => this.copy(this.link(this.current.question))),
        action("save as picture", () => this.savePicture()),
        action("save as run", () => this.saveRun()),
      );
      this.kept = h("span", { class: "pi-small", role: "status" });
      this.answerRoot = h(
        "section",
        { "data-part": "answer", class: "pi-answer", "aria-label": "the answer" },
        this.asked,
        this.three.root,
        this.painted,
        this.status,
        this.says,
        this.numbersAt,
        this.actions,
        this.kept,
      );
      return this.answerRoot;
    }

    buildHow() {
      const group = (title, ...children) => h("div", { class: "pi-how-part" }, h("h4", null, title), ...children);
      this.streams = h("div", { class: "pi-choices", role: "radiogroup", "aria-label": "stream" });
      this.operations = h("div", { class: "pi-choices", role: "radiogroup", "aria-label": "operation" });
      this.operationSays = h("p", { class: "pi-small" });
      this.weight = h("input", { type: "range", step: 0.05, "aria-label": "weight", oninput: () => this.setWeight(this.weight.value) });
      this.weightNumber = h("input", { type: "number", step: "any", "aria-label": "weight as a number", onchange: () => this.setWeight(this.weightNumber.value) });
      this.weightRow = h("div", { class: "pi-weight", hidden: true }, this.weight, this.weightNumber);
      const handle = (name) => h("input", { type: "range", min: 0, step: 1, "aria-label": `${name} step`, oninput: (event) => this.setSteps(event.target) });
      this.first = handle("first");
      this.last = handle("last");
      this.ticks = h("div", { class: "pi-ticks", "aria-hidden": "true" });
      this.stepsSay = h("p", { class: "pi-small" });
      this.chips = h("div", { class: "pi-choices" });
      this.wordsSay = h("p", { class: "pi-small" });
      this.wordsPart = group("Words", this.chips, this.wordsSay);
      this.streamsPart = group("Stream", this.streams);
      this.mask = this.buildMask();
      this.how = h(
        "section",
        { "data-part": "how", class: "pi-how", "aria-label": "how it is taken" },
        group("Operation", this.operations, this.weightRow, this.operationSays),
        this.streamsPart,
        group("Steps", h("div", { class: "pi-timeline" }, this.ticks, this.first, this.last), this.stepsSay),
        this.wordsPart,
        this.mask.root,
      );
      return this.how;
    }

    buildMask() {
      const image = picture();
      const canvas = h("canvas", { width: GRID, height: GRID });
      const pad = h("div", { class: "pi-pad", tabIndex: 0, role: "application", "aria-label": "the area: arrows move, Space marks or unmarks a square" }, image, canvas, h("span", { class: "pi-cursor" }));
      const says = h("p", { class: "pi-small", "aria-live": "polite" });
      const clear = h("button", { type: "button", class: "pi-quiet", onclick: () => { mask.cells.fill(false); mask.draw(); this.change({ mask: null }); } }, "clear the area");
      const root = h("details", { class: "pi-how-part pi-masked" }, h("summary", null, "Area"), h("div", { class: "pi-mask-row" }, pad, h("div", null, says, clear)));
      const mask = { root, image, cells: readMask(null), x: 0, y: 0 };
      let painting = null;
      mask.draw = () => {
        const context = canvas.getContext("2d");
        context.clearRect(0, 0, GRID, GRID);
        const any = mask.cells.some(Boolean);
        if (any) {
          context.fillStyle = "rgba(20, 20, 18, 0.62)";
          mask.cells.forEach((inside, k) => { if (!inside) context.fillRect(k % GRID, Math.floor(k / GRID), 1, 1); });
        }
        pad.style.setProperty("--x", mask.x);
        pad.style.setProperty("--y", mask.y);
        const share = mask.cells.filter(Boolean).length / mask.cells.length;
        says.textContent = any ? `Only in ${percent(share)} of the picture; the rest stays O's.` : "Paint on O where E's layer is to act; now it acts everywhere.";
        clear.hidden = !any;
      };
      const at = (event) => {
        const box = pad.getBoundingClientRect();
        const cell = (value) => Math.max(0, Math.min(GRID - 1, Math.floor(value * GRID)));
        return [cell((event.clientX - box.left) / box.width), cell((event.clientY - box.top) / box.height)];
      };
      const paint = (x, y) => {
        // along the way from the last square, so that a quick stroke leaves no gap
        const [fromX, fromY] = painting.at ?? [x, y];
        const steps = Math.max(Math.abs(x - fromX), Math.abs(y - fromY), 1);
        for (let k = 0; k <= steps; k++) {
          const cell = Math.round(fromY + ((y - fromY) * k) / steps) * GRID + Math.round(fromX + ((x - fromX) * k) / steps);
          mask.cells[cell] = painting.value;
        }
        painting.at = [x, y];
        mask.x = x;
        mask.y = y;
        mask.draw();
      };
      pad.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        pad.setPointerCapture(event.pointerId);
        const [x, y] = at(event);
        painting = { value: !mask.cells[y * GRID + x], at: null };
        paint(x, y);
      });
      pad.addEventListener("pointermove", (event) => painting && paint(...at(event)));
      const end = () => { if (painting) { painting = null; this.change({ mask: writeMask(mask.cells) }); } };
      pad.addEventListener("pointerup", end);
      pad.addEventListener("pointercancel", end);
      pad.addEventListener("keydown", (event) => {
        const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        if (event.key in arrows) {
          event.preventDefault();
          const [dx, dy] = arrows[event.key];
          mask.x = Math.max(0, Math.min(GRID - 1, mask.x + dx));
          mask.y = Math.max(0, Math.min(GRID - 1, mask.y + dy));
          if (event.shiftKey) mask.cells[mask.y * GRID + mask.x] = true;
          mask.draw();
          if (event.shiftKey) this.change({ mask: writeMask(mask.cells) });
        } else if (event.key === " ") {
          event.preventDefault();
          const cell = mask.y * GRID + mask.x;
          mask.cells[cell] = !mask.cells[cell];
          mask.draw();
          this.change({ mask: writeMask(mask.cells) });
        }
      });
      mask.set = (text) => { mask.cells = readMask(text); mask.draw(); if (text) root.open = true; };
      return mask;
    }

    buildStrip() {
      this.list = h("ol", { class: "pi-kept" });
      this.stripEmpty = h("p", { class: "pi-soft" }, "Every answer stays here.");
      return h("section", { "data-part": "strip", class: "pi-strip", "aria-label": "answers so far" }, h("h3", null, "Kept"), this.stripEmpty, this.list);
    }

    // .. changing the question

    /** Change a part of the question, and ask it anew. */
    change(part) {
      this.q = { ...this.q, ...part };
      this.settle();
      this.showQuestion();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.send(), DEBOUNCE);
    }

    choose(names, { add = false, stream } = {}) {
      const before = this.q.layers;
      let layers = names;
      if (add) layers = names.length === 1 && before.includes(names[0]) ? before.filter((name) => name !== names[0]) : [...new Set([...before, ...names])];
      const order = new Map(this.model.layers.map((layer, k) => [layer.name, k]));
      this.q = { ...this.q, layers: [...layers].sort((a, b) => (order.get(a) ?? 0) - (order.get(b) ?? 0)) };
      if (stream !== undefined) this.q.stream = stream;
      else if (!add && this.network.lanes.size) this.q.stream = null;
      this.settle();
      this.showQuestion();
      this.send();
    }

    chosen() {
      return this.q.layers.map((name) => this.byName.get(name)).filter(Boolean);
    }

    /** The streams that all chosen layers have. */
    commonStreams() {
      const [first, ...rest] = this.chosen();
      return first ? first.streams.filter((stream) => rest.every((layer) => layer.streams.includes(stream))) : [];
    }

    /** Whether the chosen layers' tokens, in the stream that is taken, are the caption's words. */
    takesWords() {
      const chosen = this.chosen();
      return chosen.length > 0 && chosen.every((layer) => layer.words.includes(this.q.stream ?? layer.streams[0]));
    }

    /** Let go of what the chosen layers, the caption or the steps cannot have. */
    settle() {
      const { q } = this;
      const chosen = this.chosen();
      if (chosen.length) {
        if (q.stream !== null && !this.commonStreams().includes(q.stream)) q.stream = null;
        if (chosen.length === 1 && q.stream === chosen[0].streams[0]) q.stream = null;
        if (q.operation === "bypass" && !chosen.every((layer) => layer.bypass)) q.operation = "replace";
        if (q.words !== null && !this.takesWords()) q.words = null;
      }
      if (q.operation === "replace" || q.operation === "bypass") q.weight = null;
      else if (q.weight === null) q.weight = q.operation === "blend" ? 0.5 : 1;
      if (q.operation === "bypass") q.words = null;
      if (q.words !== null) {
        const spoken = q.prompt_edit.split(/\s+/);
        const kept = q.words.split(/\s+/).filter((word) => spoken.some((each) => each === word || each.replace(/[.,;:!?]+$/, "") === word));
        q.words = kept.length ? kept.join(" ") : null;
      }
      if (/^\d/.test(q.steps)) q.steps = rangeText(...readSteps(q.steps, q.num_steps), q.num_steps);
      if (!q.image_original && !q.image_edit) q.inversion = this.model.question.inversion;
    }

    number(key, input) {
      const text = input.value.trim();
      const optional = key === "guidance";
      const value = text === "" ? null : Number(text);
      if (text === "" ? !optional : !Number.isFinite(value) || (key !== "guidance" && !Number.isInteger(value))) {
        this.fail(`${input.getAttribute("aria-label") || key.replace("_", " ")} ${JSON.stringify(text)}: give a ${key === "guidance" ? "number" : "whole number"}.`);
        this.showQuestion();
        return;
      }
      this.change({ [key]: value });
    }

    setScene(side, attribute, value) {
      const key = `prompt_${side}`;
      const scene = { ...parseCaption(this.q[key], this.model.values), [attribute]: value };
      this.change({ [key]: caption(scene) });
    }

    setWeight(text) {
      const value = Number(text);
      if (text === "" || !Number.isFinite(value)) { this.fail(`weight ${JSON.stringify(text)}: give a number.`); this.showQuestion(); return; }
      this.change({ weight: value });
    }

    setSteps(moved) {
      let [first, last] = [Number(this.first.value), Number(this.last.value)];
      if (first > last) { if (moved === this.first) last = first; else first = last; }
      this.change({ steps: rangeText(first, last, this.q.num_steps) });
    }

    toggleWord(word) {
      const now = this.q.words === null ? [] : this.q.words.split(" ");
      const wanted = now.includes(word) ? now.filter((each) => each !== word) : [...now, word];
      const order = (this.start.words || []).map((each) => each.word);
      this.change({ words: wanted.length ? [...new Set(order.filter((each) => wanted.includes(each)))].join(" ") : null });
    }

    async upload(side, file) {
      try {
        const response = await fetch("picture", { method: "POST", headers: { "X-Name": encodeURIComponent(file.name) }, body: file });
        const told = await response.json();
        if (told.error) throw new Error(told.error);
        this.uploads.set(told.id, told);
        this.change({ [`image_${side}`]: told.id, inversion: this.q.inversion ?? this.model.inversions[0] });
      } catch (error) {
        this.fail(error.message);
      }
    }

    // .. asking

    fail(text) {
      this.alert.textContent = text;
      this.alert.hidden = false;
    }

    async post(where, body) {
      try {
        const response = await fetch(where, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
        const told = await response.json();
        if (told.error) this.fail(told.error);
        return told;
      } catch {
        this.fail("No answer came: is probekit inspect still running?");
        return { error: true };
      }
    }

    /** The lines that the server answers with; what goes wrong becomes one line of {error}. */
    async *stream(where, body, signal) {
      try {
        const response = await fetch(where, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
        if (!response.ok) {
          const text = await response.text();
          let told = null;
          try { told = JSON.parse(text); } catch { /* not ours */ }
          yield { error: told?.error || `The server says ${response.status} ${response.statusText}.` };
          return;
        }
        yield* linesOf(response);
      } catch (error) {
        if (error.name !== "AbortError") yield { error: "No answer came: is probekit inspect still running?" };
      }
    }

    async send() {
      clearTimeout(this.timer);
      const turn = ++this.turn;
      const question = structuredClone(this.q);
      this.asking?.abort();
      this.asking = new AbortController();
      this.alert.hidden = true;
      this.writeHash();
      this.choosing(null);
      const { R } = this.three.images;
      R.removeAttribute("data-id");
      R.classList.add("pi-waiting");
      this.status.textContent = question.layers.length ? "asking …" : "making O and E …";
      this.answerRoot.classList.add("pi-busy");
      let ended = false;
      for await (const line of this.stream("ask", { tab: this.tab, question }, this.asking.signal)) {
        if (turn !== this.turn) return;
        if (line.waiting) this.status.textContent = "waiting for another question …";
        if (line.start) this.showStart(line.start);
        if (line.step !== undefined) this.showStep(line);
        if (line.answer) { ended = true; this.keep({ question, answer: line.answer }); this.fill(question, line.answer); }
        if (line.ready) { ended = true; this.showReady(); }
        if (line.error) { ended = true; this.fail(line.error); this.showNothing(); }
        if (line.replaced) { ended = true; this.idle(""); }
      }
      if (!ended && turn === this.turn) { this.fail("The answer broke off: is probekit inspect still running?"); this.showNothing(); }
    }

    /** No answer came: what is seen is none of this question. */
    showNothing() {
      setPicture(this.three.images.R, null);
      this.says.textContent = "";
      this.numbersAt.replaceChildren();
      this.idle("");
    }

    idle(says) {
      this.answerRoot.classList.remove("pi-busy");
      this.painted.value = 0;
      this.status.textContent = says;
      this.three.images.R.classList.remove("pi-waiting", "pi-preview");
    }

    showStart(start) {
      this.start = { ...this.start, ...start };
      for (const [end, side] of [["O", "original"], ["E", "edit"]]) {
        if (!start[end]) continue;
        setPicture(this.three.images[end], start[end], `${end}: ${this.q[`prompt_${side}`]}`);
        setPicture(this.cards[side].image, start[end], end);
      }
      setPicture(this.mask.image, this.start.O, "O");
      this.showWords();
    }

    /** A preview after so many steps. */
    showStep({ step, of, picture: url }) {
      const { R } = this.three.images;
      if (url) { setPicture(R, url, `the picture after ${step} of ${of} steps`); R.classList.add("pi-preview"); R.classList.remove("pi-waiting"); }
      this.painted.max = of;
      this.painted.value = step;
      this.status.textContent = `step ${step} of ${of}`;
    }

    showReady() {
      this.showNothing();
      this.three.names.R.textContent = "";
      this.idle("Choose a layer to see what comes over with it.");
    }

    /** Keep an answer or a sweep on the strip, and show it. */
    keep(entry, shown = true) {
      this.entries.push(entry);
      const { answer } = entry;
      const image = picture();
      setPicture(image, entry.thumb || answer.picture, "");
      entry.button = h("button", { type: "button", title: answer.says || "", onclick: () => this.restore(entry) }, image, h("span", null, this.describe(entry.question, entry.swept)));
      this.list.append(h("li", null, entry.button));
      this.stripEmpty.hidden = true;
      this.list.scrollLeft = this.list.scrollWidth;
      entry.button.setAttribute("aria-current", "false");
      if (!shown) return;
      this.choosing(entry);
      this.showAnswer(entry);
    }

    choosing(entry) {
      this.current = entry;
      for (const each of this.entries) each.button.setAttribute("aria-current", String(each === entry));
      this.actions.hidden = !this.entries.length;
      for (const button of this.actions.children) button.disabled = !entry;
      this.kept.textContent = "";
    }

    showAnswer(entry) {
      const { answer, question } = entry;
      const { R } = this.three.images;
      this.showStart({ O: answer.O, E: answer.E });
      setPicture(R, entry.swept ? null : answer.picture, this.describe(question));
      if (entry.swept) R.removeAttribute("data-id");
      else R.dataset.id = answer.id;
      this.asked.textContent = this.describe(question, entry.swept);
      this.three.names.R.textContent = entry.swept ? "one by one, in the network" : "the answer";
      this.idle(answer.seconds !== undefined && answer.seconds !== null ? `answered in ${answer.seconds.toFixed(2)} s` : "");
      this.says.textContent = answer.says || "";
      this.numbersAt.replaceChildren(...(this.numbers(answer) || []));
    }

    /** Go back to a question that was answered. Nothing is computed again. */
    restore(entry) {
      clearTimeout(this.timer);
      this.turn++;
      this.asking?.abort();
      this.alert.hidden = true;
      this.q = structuredClone(entry.question);
      this.showQuestion();
      this.writeHash();
      this.choosing(entry);
      this.showAnswer(entry);
    }

    numbers(answer) {
      const { read = [], measures = [] } = answer;
      if (!read.length && !measures.length) return null;
      const from = { O: "O's", E: "E's", both: "both alike", neither: "neither's" };
      const table = (head, rows) => h("table", null, h("thead", null, h("tr", null, head.map((text) => h("th", { scope: "col" }, text)))), h("tbody", null, rows));
      const cells = (first, rest) => h("tr", null, h("th", { scope: "row" }, first), rest.map((text) => h("td", null, text)));
      return [
        h(
          "details",
          { class: "pi-numbers", open: this.opened, ontoggle: (event) => { this.opened = event.target.open; } },
          h("summary", null, "numbers"),
          h(
            "div",
            { class: "pi-scroll pi-tables" },
            read.length ? table(["read", "O", "here", "E", "whose"], read.map((row) => cells(row.attribute, [row.original, row.seen, row.edit, from[row.from] || row.from]))) : null,
            measures.length ? table(["measure", "transfer", "damage"], measures.map((row) => cells(row.name, [number(row.transfer), number(row.damage)]))) : null,
          ),
          h("p", { class: "pi-small" }, "Transfer: 0, the picture is as far from E as O is; 1, it is E. Damage: 0, it is O or E; 1, it is neither."),
        ),
      ];
    }

    // .. tiles

    pairOf(q) {
      const { layers, stream, operation, weight, steps, words, mask, ...pair } = q;
      return JSON.stringify(this.network.lanes.size ? { ...pair, stream } : pair);
    }

    howOf(q) {
      const { layers, ...how } = q;
      return JSON.stringify(how);
    }

    put(q, window, layer, told) {
      const at = (map, key) => { if (!map.has(key)) map.set(key, new Map()); return map.get(key); };
      at(at(this.pictures, this.howOf(q)), window).set(layer, told);
      if (!window.includes("%")) at(this.latest, this.pairOf(q)).set(layer, told);
    }

    fill(question, answer) {
      if (question.layers.length !== 1) return;
      const [layer] = question.layers;
      const before = this.pictures.get(this.howOf(question))?.get("all")?.get(layer) || {};
      this.put(question, "all", layer, { says: answer.says, ...before, picture: answer.picture });
      this.showTiles();
    }

    showTiles() {
      const windows = this.pictures.get(this.howOf(this.q)) || new Map();
      const streams = this.network.lanes.size ? [null, "text"] : [this.q.stream];
      const known = new Map(streams.map((stream) => {
        const q = { ...this.q, stream };
        const base = [...(this.pictures.get(this.howOf(q)) || [])].filter(([window]) => !window.includes("%")).map(([, layers]) => layers);
        return [stream, { base, latest: this.latest.get(this.pairOf(q)) || new Map() }];
      }));
      this.network.show((name, lane) => {
        const { base, latest } = known.get(this.network.lanes.size ? lane : this.q.stream);
        const told = base.map((layers) => layers.get(name)).find(Boolean);
        return told || (latest.has(name) ? { ...latest.get(name), says: "taken otherwise than is chosen now", stale: true } : null);
      });
      const parts = [...windows.keys()].filter((window) => window.includes("%"));
      this.time.hidden = !parts.length;
      if (!parts.length) return;
      const names = new Set(parts.flatMap((window) => [...windows.get(window).keys()]));
      this.time.replaceChildren(
        h("h3", null, "Layer by time"),
        h("p", { class: "pi-soft" }, "O with a layer taken from E in a part of the steps only; 0 % is where noise becomes a picture. Click one to ask it."),
        timeMap({
          layers: this.model.layers.filter((layer) => names.has(layer.name)),
          windows: parts,
          of: (window, name) => windows.get(window).get(name),
          chosen: (window, name) => this.q.layers.length === 1 && this.q.layers[0] === name && this.q.steps === stepsOf(window, this.q.num_steps),
          choose: (window, name) => { this.q = { ...this.q, layers: [name], steps: stepsOf(window, this.q.num_steps) }; this.settle(); this.showQuestion(); this.send(); },
        }),
      );
    }

    // .. sweeping

    async sweep() {
      if (this.sweeping) return;
      // a stream and words are of the layers that are chosen; a sweep takes others
      const question = { ...structuredClone(this.q), stream: null, words: null };
      const windows = this.byTime.checked ? 4 : 1;
      this.sweeping = new AbortController();
      this.alert.hidden = true;
      this.sweepButton.hidden = true;
      this.stopButton.hidden = false;
      this.progress.hidden = false;
      const expected = this.model.default_layers.length * (windows > 1 ? windows + 1 : 1);
      this.progress.max = expected;
      this.progress.value = 0;
      this.sweepSays.textContent = "making O and E …";
      let count = 0;
      let thumb = null;
      let ended = false;
      for await (const line of this.stream("sweep", { tab: this.tab, question, windows }, this.sweeping.signal)) {
        if (line.waiting) this.sweepSays.textContent = "waiting for another question …";
        if (line.start) { if (this.pairOf(question) === this.pairOf(this.q)) this.showStart(line.start); this.sweepStart = line.start; }
        if (line.tile) {
          const { tile } = line;
          this.put(question, tile.window, tile.layer, { picture: tile.picture, colour: tile.came === "nothing" ? null : tile.colour, says: tile.says });
          count += 1;
          this.progress.max = Math.max(expected, count);
          this.progress.value = count;
          this.sweepSays.textContent = `${count} of ${Math.max(expected, count)}`;
          thumb = tile.came && tile.came !== "nothing" ? tile.picture : thumb || tile.picture;
          this.showTiles();
        }
        const swept = line.done || line.stopped;
        if (swept) {
          ended = true;
          this.sweepSays.textContent = swept.says || "swept";
          const { O, E } = this.sweepStart || {};
          if (swept.id) this.keep({ question, swept: true, thumb, answer: { O, E, caption: swept.says, ...swept, picture: thumb } }, !this.q.layers.length);
        }
        if (line.replaced) { ended = true; this.sweepSays.textContent = `left at ${count}`; }
        if (line.error) { ended = true; this.fail(line.error); this.sweepSays.textContent = ""; }
      }
      if (!ended) this.sweepSays.textContent = `broke off at ${count}`;
      this.sweeping = null;
      this.sweepButton.hidden = false;
      this.stopButton.hidden = true;
      this.progress.hidden = true;
    }

    // .. keeping

    link(question) {
      const text = this.hashOf(question);
      return location.href.split("#")[0] + (text ? `#${encodeURIComponent(text)}` : "");
    }

    async copy(text) {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        const area = h("textarea", { value: text, style: "position:fixed;opacity:0", "aria-hidden": "true" });
        this.root.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      this.kept.textContent = "copied";
    }

    async saveRun() {
      this.kept.textContent = "saving …";
      const told = await this.post("save", { id: this.current.answer.id });
      this.kept.textContent = told.folder ? `saved in ${told.folder}` : "";
    }

    async savePicture() {
      const { answer, question, swept } = this.current;
      const load = (url) => new Promise((resolve, reject) => { const image = new Image(); image.onload = () => resolve(image); image.onerror = () => reject(new Error("a picture is not there any more")); image.src = url; });
      try {
        const images = await Promise.all([answer.O, answer.picture, answer.E].filter(Boolean).map(load));
        const side = Math.max(256, ...images.map((image) => image.naturalWidth));
        const [gap, margin] = [24, 32];
        const width = 2 * margin + images.length * side + (images.length - 1) * gap;
        const canvas = h("canvas", { width, height: 10 });
        const context = canvas.getContext("2d");
        const font = '17px Georgia, "Times New Roman", serif';
        context.font = font;
        const text = wrap(context, answer.caption || `${this.describe(question, swept)}. ${answer.says || ""}`, width - 2 * margin);
        canvas.height = margin + side + 34 + text.length * 25 + margin;
        context.fillStyle = "#ffffff";
        context.fillRect(0, 0, canvas.width, canvas.height);
        context.imageSmoothingEnabled = false;
        images.forEach((image, k) => context.drawImage(image, margin + k * (side + gap), margin, side, (side * image.naturalHeight) / image.naturalWidth));
        context.fillStyle = "#6d6b62";
        context.font = font;
        context.textAlign = "center";
        (images.length === 3 ? ["O", swept ? "one of the swept" : "the answer", "E"] : []).forEach((name, k) => context.fillText(name, margin + k * (side + gap) + side / 2, margin + side + 22));
        context.textAlign = "left";
        context.fillStyle = "#26251f";
        text.forEach((line, k) => context.fillText(line, margin, margin + side + 34 + 25 * (k + 1)));
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
        const url = URL.createObjectURL(blob);
        h("a", { href: url, download: `probekit-${answer.id}.png` }).click();
        setTimeout(() => URL.revokeObjectURL(url), 10_000);
        this.kept.textContent = "saved as a picture";
      } catch (error) {
        this.fail(`The picture cannot be saved: ${error.message}.`);
      }
    }

    // .. showing the question

    layersText(q) {
      const names = q.layers.map((name) => this.byName.get(name)?.short ?? name);
      return names.length > 3 ? `${names.slice(0, 2).join(", ")} and ${names.length - 2} more layers` : listed(names);
    }

    /** A question in words. */
    describe(q, swept = false) {
      if (!q.layers.length && !swept) return "O and E";
      const what = swept ? "each layer" : this.layersText(q);
      const how = {
        replace: `${what} taken from E`,
        blend: `${what} mixed with E's, ${percent(q.weight ?? 1)} of it`,
        add: `${q.weight ?? 1} times E's ${what} added`,
        bypass: `${what} left out`,
      }[q.operation];
      const parts = [`O with ${how}`];
      if (q.stream !== null) parts.push(q.stream === "both" ? streamText("both", this.chosen()) : `${streamText(q.stream, [])} only`);
      if (q.steps !== "all") parts.push(`at step${/-/.test(q.steps) ? "s" : ""} ${q.steps.replace("-", " to ")} of ${q.num_steps}`);
      if (q.words !== null) parts.push(`only the word${q.words.includes(" ") ? "s" : ""} “${q.words}”`);
      if (q.mask !== null) parts.push("inside the painted area");
      return (swept ? "Swept: " : "") + parts.join(", ");
    }

    showQuestion() {
      const { q } = this;
      this.showCards();
      for (const [key, input] of Object.entries(this.fields)) if (document.activeElement !== input) input.value = q[key] ?? "";
      this.inversionLabel.hidden = !q.image_original && !q.image_edit;
      if (q.inversion) this.inversion.value = q.inversion;
      this.network.mark(q.layers, q.stream);
      this.asked.textContent = this.describe(q);
      this.three.names.R.textContent = q.layers.length ? "the answer" : "";
      this.showHow();
      this.showTiles();
    }

    showCards() {
      const { q, model } = this;
      for (const side of ["original", "edit"]) {
        const card = this.cards[side];
        const prompt = q[`prompt_${side}`];
        const scene = model.values && parseCaption(prompt, model.values);
        const free = card.free || !scene;
        if (card.scene) card.scene.hidden = free;
        card.text.hidden = !free;
        if (document.activeElement !== card.text) card.text.value = prompt;
        if (card.toggle) {
          card.toggle.textContent = free ? "use menus" : "write freely";
          card.toggle.disabled = free && !scene;
          card.toggle.title = free && !scene ? "this caption is no scene" : "";
        }
        if (scene) {
          const other = parseCaption(q[`prompt_${side === "edit" ? "original" : "edit"}`], model.values);
          for (const [attribute, select] of Object.entries(card.menus)) {
            select.value = scene[attribute];
            select.classList.toggle("pi-differs", !!other && other[attribute] !== scene[attribute]);
            const clash = { colour: scene.ground, ground: scene.colour }[attribute];
            for (const option of select.options) option.disabled = option.value === clash;
          }
        }
        const id = q[`image_${side}`];
        card.given.hidden = !id;
        if (card.pick) card.pick.hidden = !!id;
        if (id) {
          const told = this.uploads.get(id);
          card.given.replaceChildren(
            told?.url ? picture({ src: told.url }) : "",
            told?.name || "a given picture",
            h("button", { type: "button", class: "pi-quiet", "aria-label": `take the given picture of ${side === "edit" ? "E" : "O"} away`, onclick: () => this.change({ [`image_${side}`]: null }) }, "take away"),
          );
        }
        card.noiseLabel.hidden = !!id;
      }
      const { original, edit } = this.cards;
      if (document.activeElement !== original.noise) original.noise.value = q.noise;
      edit.same.checked = q.noise_edit === null;
      edit.noise.parentElement.hidden = q.noise_edit === null;
      if (document.activeElement !== edit.noise) edit.noise.value = q.noise_edit ?? "";
    }

    /** One of a row of choices. */
    option(group, value, label, now, set, title = "") {
      return h("label", { class: "pi-choice", title }, h("input", { type: "radio", name: `${group}-${this.tab}`, value: String(value), checked: value === now, onchange: () => set(value) }), h("span", null, label));
    }

    /** Fill a row of choices anew, and keep the focus in it. */
    refill(container, options) {
      const focused = container.contains(document.activeElement) ? document.activeElement.value : null;
      container.replaceChildren(...options);
      if (focused !== null) [...container.querySelectorAll("input, button")].find((each) => each.value === focused)?.focus();
    }

    showHow() {
      const { q } = this;
      const chosen = this.chosen();
      const bypass = chosen.every((layer) => layer.bypass);
      this.refill(
        this.operations,
        Object.keys(OPERATIONS).filter((name) => name !== "bypass" || bypass).map((name) => this.option("operation", name, name, q.operation, (value) => this.change({ operation: value, weight: null }))),
      );
      this.operationSays.textContent = OPERATIONS[q.operation];
      this.weightRow.hidden = q.weight === null;
      if (q.weight !== null) {
        const [low, high] = q.operation === "add" ? [-2, 2] : [0, 1];
        this.weight.min = low;
        this.weight.max = high;
        this.weight.value = q.weight;
        if (document.activeElement !== this.weightNumber) this.weightNumber.value = q.weight;
      }
      const common = this.commonStreams();
      const single = chosen.length === 1 || chosen.every((layer) => layer.streams[0] === chosen[0].streams[0]);
      const own = single && chosen.length ? chosen[0].streams[0] : null;
      const streams = [
        ...(own ? [] : [[null, "each layer's own"]]),
        ...common.map((name) => [name === own ? null : name, streamText(name, chosen)]),
      ];
      this.streamsPart.hidden = streams.length < 2;
      this.refill(this.streams, streams.map(([value, label]) => this.option("stream", value, label, q.stream, (stream) => this.change({ stream }))));
      const count = q.num_steps;
      const [first, last] = readSteps(q.steps, count);
      this.first.max = this.last.max = count - 1;
      this.first.value = first;
      this.last.value = last;
      const ticks = Math.min(count, 100);
      const share = (k) => (count > 1 ? k / (count - 1) : 0);
      this.ticks.style.setProperty("--from", share(first));
      this.ticks.style.setProperty("--to", share(last));
      if (this.ticks.childElementCount !== ticks) this.ticks.replaceChildren(...Array.from({ length: ticks }, () => h("i")));
      [...this.ticks.children].forEach((tick, k) => { const at = Math.floor((k * count) / ticks); tick.className = at >= first && at <= last ? "pi-in" : ""; });
      const odd = q.steps !== "all" && !/^\d+(-\d+)?$/.test(q.steps);
      this.stepsSay.textContent = odd ? `At steps ${q.steps}.`
        : q.steps === "all" ? `At all ${count} steps.`
          : `At ${first === last ? `step ${first}` : `steps ${first} to ${last}`} of 0 to ${count - 1}; 0 is the noisiest. At the others, O goes on alone.`;
      this.showWords();
      if (writeMask(this.mask.cells) !== q.mask) this.mask.set(q.mask);
      else this.mask.draw();
      this.how.classList.toggle("pi-idle", !chosen.length);
    }

    showWords() {
      const { q } = this;
      const words = [...new Set((this.start.words || []).map((each) => each.word))];
      const takes = this.takesWords() && q.operation !== "bypass";
      const could = !takes && q.operation !== "bypass" ? this.commonStreams().find((stream) => this.chosen().every((layer) => layer.words.includes(stream))) : null;
      this.wordsPart.hidden = !(takes && words.length) && !could;
      if (could) {
        this.refill(this.chips, [h("button", { type: "button", class: "pi-quiet", onclick: () => this.change({ stream: could }) }, `take ${streamText(could, [])}`)]);
        this.wordsSay.textContent = "Its tokens of the caption can be taken word by word.";
      } else if (takes) {
        const on = new Set(q.words === null ? [] : q.words.split(" "));
        this.refill(this.chips, words.map((word) => h("button", { type: "button", value: word, class: "pi-word", "aria-pressed": String(on.has(word)), onclick: () => this.toggleWord(word) }, word)));
        this.wordsSay.textContent = on.size ? "Only these words of E's caption are taken." : "All words of E's caption are taken; choose some to take only those.";
      }
    }
  }

  function wrap(context, text, width) {
    const lines = [""];
    for (const word of text.split(/\s+/)) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (context.measureText(longer).width > width && lines.at(-1)) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    return lines;
  }

  // --- the element -----------------------------------------------------------------------------------------------------

  class ProbekitInspector extends HTMLElement {
    connectedCallback() {
      if (this.shown) return;
      const script = this.querySelector('script[type="application/json"]');
      if (this.pending) this.show(this.pending);
      else if (script) this.show(JSON.parse(script.textContent));
    }

    disconnectedCallback() {
      queueMicrotask(() => { if (!this.isConnected) { this.live?.stop(); this.shown = null; } });
    }

    get data() {
      return this.shown || this.pending || null;
    }

    set data(data) {
      this.pending = data;
      if (this.isConnected) this.show(data);
    }

    show(data) {
      this.live?.stop();
      this.live = null;
      this.shown = data;
      const script = this.querySelector('script[type="application/json"]');
      const runs = data.runs || [];
      const live = data.model && this.hasAttribute("live") ? new Live(data.model) : null;
      this.live = live;
      const views = [];
      for (const run of runs) {
        const view = new RunView(run, {
          onChoose: (layer) => views.forEach((each) => each !== view && each.follow({ layer })),
          onPair: (pair) => views.forEach((each) => each !== view && each.follow({ pair })),
          ask: live && ((whole, pair) => this.askFurther(whole, pair)),
        });
        views.push(view);
      }
      const finished = h("div", { class: `pi-runs${views.length > 1 ? " pi-two" : ""}` }, views.map((view, k) => h("div", { class: "pi-of" }, views.length > 1 || live ? h("h3", { class: "pi-title" }, runs[k].title) : null, view.root)));
      const parts = [script, live?.root, views.length ? finished : null].filter(Boolean);
      if (live && views.length) {
        const tab = (text, root) => { const button = h("button", { type: "button", role: "tab", onclick: () => this.turnTo(button) }, text); button.root = root; return button; };
        this.tabs = [tab(views.length > 1 ? "the runs" : "the run", finished), tab("ask the model", live.root)];
        this.panel = h("div", { role: "tabpanel" });
        this.replaceChildren(...[script].filter(Boolean), h("div", { class: "pi-tabs", role: "tablist" }, this.tabs), this.panel);
        this.turnTo(this.tabs[location.hash.length > 1 ? 1 : 0]);
        return;
      }
      if (parts.every((part) => part === script)) parts.push(h("p", { class: "pi-empty" }, "There is nothing to show: no model and no run."));
      this.replaceChildren(...parts);
      live?.begin();
    }

    /** Show the one or the other; only what is shown is in the page. */
    turnTo(button) {
      for (const each of this.tabs) each.setAttribute("aria-selected", String(each === button));
      this.panel.replaceChildren(button.root);
      if (button.root === this.live.root && !this.live.begun) { this.live.begun = true; this.live.begin(); }
    }

    askFurther(run, pair) {
      const { live } = this;
      const same = Object.fromEntries(Object.entries({ ...run.question, noise: pair.noise }).filter(([key, value]) => key in live.q && value !== undefined));
      live.q = { ...live.model.question, ...same, prompt_original: pair.original, prompt_edit: pair.edit };
      live.begun = true;
      this.turnTo(this.tabs[1]);
      live.restored();
    }
  }

  customElements.define("probekit-inspector", ProbekitInspector);
})();
