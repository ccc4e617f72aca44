"use strict";
// The page of a server: sends an image, shows its slices and mask. Nothing is loaded from elsewhere.

const VIEW = "application/vnd.medseg.view";
const LONGEST_SIDE = 640; // of the shown image in CSS pixels
const element = (id) => document.getElementById(id);
const state = { view: null, slice: 0, shown: new Set(), request: null, token: "" };

function headers(accept) {
  return state.token ? { Accept: accept, Authorization: `Bearer ${state.token}` } : { Accept: accept };
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function ask(path, accept, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(accept) });
  if (response.status === 401) element("token-form").hidden = false;
  if (!response.ok) {
    const reason = await response.json().then((body) => body.error, () => response.statusText);
    throw new Error(reason);
  }
  return response;
}

async function loadModels() {
  try {
    const { models } = await (await ask("v1/models", "application/json")).json();
    element("model").replaceChildren(...models.map((model) => new Option(`${model.name} (${model.version})`, model.name)));
    element("token-form").hidden = true;
    say("Ready.");
  } catch (error) {
    say(error.message, true);
  }
}

// ---- sending -------------------------------------------------------------------------------------------------------

async function segment(file) {
  say(`Sending ${file.name || "the image"} …`);
  element("progress").hidden = false;
  element("progress").removeAttribute("value");
  try {
    const path = `v1/segment?model=${encodeURIComponent(element("model").value)}`;
    let response = await ask(path, VIEW, { method: "POST", body: file });
    state.request = { path, file };
    if (response.status === 202) {
      const job = await follow(await response.json());
      state.request = { path: job.result.slice(1), file: null };
      response = await ask(state.request.path, VIEW);
    }
    show(parse(await response.arrayBuffer()));
  } catch (error) {
    say(error.message, true);
  } finally {
    element("progress").hidden = true;
  }
}

async function follow(job) {
  const response = await ask(`${job.address.slice(1)}/events`, "text/event-stream");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the progress of the job.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (!data) continue;
      const now = JSON.parse(data.slice(6));
      if (now.state === "failed") throw new Error(now.error);
      if (now.state === "done") return now;
      if (now.slices_total) element("progress").value = now.slices_done / now.slices_total;
      say(now.slices_total ? `Slice ${now.slices_done} of ${now.slices_total}` : `The job is ${now.state}.`);
    }
  }
}

// ---- the view: 4 bytes length, JSON, pixels, labels -----------------------------------------------------------------

function parse(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const view = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = { uint8: Uint8Array, int16: Int16Array, float32: Float32Array };
  const [slices, height, width] = view.shape;
  const count = slices * height * width;
  view.pixels = new kinds[view.dtype](buffer.slice(view.pixels_start), 0, count * view.channels);
  view.labels = new Uint8Array(buffer, view.labels_start, count);
  return view;
}

function show(view) {
  state.view = view;
  state.shown = new Set(view.classes.map((entry) => entry.label));
  const [slices, height, width] = view.shape;
  state.slice = middle(view);
  const [, rows_mm, columns_mm] = view.spacing_mm || [1, 1, 1];
  const size = [width * columns_mm, height * rows_mm];
  element("viewer").hidden = element("controls").hidden = false; // before its width is asked for
  const scale = Math.min(LONGEST_SIDE / Math.max(...size), element("viewer").clientWidth / size[0]);
  for (const id of ["image", "overlay"]) {
    Object.assign(element(id), { width, height });
    element(id).style.width = `${Math.round(size[0] * scale)}px`;
    element(id).style.height = `${Math.round(size[1] * scale)}px`;
  }
  element("slice").max = slices - 1;
  element("slice-row").hidden = slices === 1;
  element("window-row").hidden = view.channels !== 1;
  const [low, high] = view.window;
  element("center").value = (low + high) / 2;
  element("width").value = high - low;
  fillClasses(view);
  document.querySelector('[data-accept="application/dicom"]').hidden = !view.is_dicom;
  draw();
  const outside = view.outside_fraction;
  const left = outside > 0 ? ` ${Math.round(100 * outside)} % of every slice is outside the model's field of view.` : "";
  say(`Done: ${slices} slice${slices > 1 ? "s" : ""} of ${width} × ${height} pixels.${left}`);
}

function middle(view) {
  const [slices, height, width] = view.shape;
  let best = Math.floor(slices / 2);
  let most = 0;
  for (let slice = 0; slice < slices; slice += 1) {
    let labelled = 0;
    for (let i = slice * height * width; i < (slice + 1) * height * width; i += 1) labelled += view.labels[i] > 0;
    if (labelled > most) [best, most] = [slice, labelled];
  }
  return best;
}

function fillClasses(view) {
  const rows = view.classes.map((entry) => {
    const row = document.createElement("tr");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    box.setAttribute("aria-label", `Show ${entry.name}`);
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(entry.label);
      else state.shown.delete(entry.label);
      draw();
    });
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.backgroundColor = `rgb(${entry.color.join(",")})`;
    const size = entry.ml !== null ? `${entry.ml.toFixed(1)} ml` : entry.mm2 !== null ? `${entry.mm2.toFixed(1)} mm²` : "–";
    const cells = [box, [swatch, entry.name], entry.pixels.toLocaleString("en"), size];
    for (const content of cells) {
      const cell = document.createElement("td");
      cell.append(...[content].flat());
      row.append(cell);
    }
    return row;
  });
  element("classes").replaceChildren(...rows);
}

// ---- drawing -------------------------------------------------------------------------------------------------------

function draw() {
  const view = state.view;
  if (!view) return;
  const [slices, height, width] = view.shape;
  const size = height * width;
  const low = Number(element("center").value) - Number(element("width").value) / 2;
  const scale = 255 / Math.max(Number(element("width").value), 1e-6);
  const image = new ImageData(width, height);
  const overlay = new ImageData(width, height);
  const colors = new Map(view.classes.map((entry) => [entry.label, entry.color]));
  for (let i = 0; i < size; i += 1) {
    const at = (state.slice * size + i) * view.channels;
    for (let channel = 0; channel < 3; channel += 1) {
      const value = view.pixels[at + (view.channels === 3 ? channel : 0)];
      image.data[4 * i + channel] = (value - low) * scale; // clamped and rounded by the array
    }
    image.data[4 * i + 3] = 255;
    const label = view.labels[state.slice * size + i];
    if (label && state.shown.has(label)) overlay.data.set([...colors.get(label), 255], 4 * i);
  }
  element("image").getContext("2d").putImageData(image, 0, 0);
  element("overlay").getContext("2d", { willReadFrequently: true }).putImageData(overlay, 0, 0);
  element("overlay").style.opacity = element("opacity").value / 100;
  element("opacity-number").textContent = `${element("opacity").value} %`;
  element("slice").value = state.slice;
  element("slice-number").textContent = `${state.slice + 1} of ${slices}`;
  element("stage").setAttribute("aria-label", `Slice ${state.slice + 1} of ${slices} with its mask`);
}

function moveTo(slice) {
  if (!state.view) return;
  state.slice = Math.min(Math.max(slice, 0), state.view.shape[0] - 1);
  draw();
}

async function download(accept) {
  try {
    const { path, file } = state.request;
    const response = await ask(path, accept, file ? { method: "POST", body: file } : {});
    const name = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition") || "");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = name ? name[1] : "mask";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    say(error.message, true);
  }
}

// ---- events --------------------------------------------------------------------------------------------------------

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  element("theme").setAttribute("aria-pressed", String(dark));
}

const STAGE_KEYS = {
  ArrowUp: () => moveTo(state.slice + 1),
  ArrowDown: () => moveTo(state.slice - 1),
  Home: () => moveTo(0),
  End: () => moveTo(Infinity),
  o: () => setOpacity(element("opacity").value > 0 ? 0 : 50),
  "+": () => setOpacity(Number(element("opacity").value) + 10),
  "-": () => setOpacity(Number(element("opacity").value) - 10),
};

function setOpacity(value) {
  element("opacity").value = value;
  draw();
}

function connect() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  element("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  element("file").addEventListener("change", (event) => event.target.files[0] && segment(event.target.files[0]));
  element("drop").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      element("file").click();
    }
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      element("drop").classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) segment(event.dataTransfer.files[0]);
    });
  }
  element("sample").addEventListener("click", async () => {
    const path = `sample.png?model=${encodeURIComponent(element("model").value)}`;
    try {
      segment(new File([await (await ask(path, "image/png")).blob()], "sample.png"));
    } catch (error) {
      say(error.message, true);
    }
  });
  element("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.token = element("token").value;
    loadModels();
  });
  for (const id of ["opacity", "center", "width"]) element(id).addEventListener("input", draw);
  element("slice").addEventListener("input", (event) => moveTo(Number(event.target.value)));
  element("stage").addEventListener("wheel", (event) => {
    event.preventDefault();
    moveTo(state.slice - Math.sign(event.deltaY));
  }, { passive: false });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = STAGE_KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && state.view) {
      event.preventDefault();
      act();
    }
  });
  for (const button of document.querySelectorAll("[data-accept]")) {
    button.addEventListener("click", () => download(button.dataset.accept));
  }
  loadModels();
}

connect();
