"use strict";
// Shows the service's OpenAPI document and sends requests from it. Everything is put in as text, never as markup.

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

const resolved = (schema, api) => {
  const name = schema && schema.$ref && schema.$ref.split("/").pop();
  return name ? api.components.schemas[name] : schema || {};
};

const kind = (schema) => {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items || {})}`;
  if (schema.enum) return schema.enum.map((item) => JSON.stringify(item)).join(", ");
  return [].concat(schema.type || "any").join(" or ");
};

const field = (name, about, required, input) =>
  make("label", {}, make("code", {}, name), ` ${about}${required ? ", required" : ""}`, input);

function parameterInputs(operation, inputs) {
  return (operation.parameters || []).map((parameter) => {
    const input = make("input", { spellcheck: "false" });
    inputs.push({ parameter, input });
    return field(parameter.name, `${parameter.in}, ${kind(parameter.schema || {})}`, parameter.required, input);
  });
}

function bodyInputs(operation, api, body) {
  const content = (operation.requestBody || {}).content || {};
  const [media] = Object.keys(content);
  if (!media) return [];
  body.media = media;
  if (media === "application/json") {
    body.input = make("textarea", { spellcheck: "false" });
    body.input.value = JSON.stringify(content[media].example || {}, null, 2);
    return [field("body", `${media}, ${kind(content[media].schema || {})}`, true, body.input)];
  }
  if (media !== "multipart/form-data") {
    body.input = make("input", { type: "file" });
    return [field("body", media, true, body.input)];
  }
  const schema = resolved(content[media].schema, api);
  body.fields = Object.entries(schema.properties || {}).map(([name, about]) => {
    const input = make("input", about.format === "binary" ? { type: "file" } : { spellcheck: "false" });
    if (about.enum) input.placeholder = about.enum.join(", ");
    return { name, input, about, required: (schema.required || []).includes(name) };
  });
  return body.fields.map(({ name, input, about, required }) => field(name, kind(about), required, input));
}

function requestOf(path, method, inputs, body) {
  const headers = {}, query = new URLSearchParams();
  const key = document.getElementById("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  let place = path;
  for (const { parameter, input } of inputs) {
    if (parameter.in === "path") {
      const name = parameter.name;
      place = place.replace(`{${name}}`, encodeURIComponent(input.value)).replace(`{${name}:path}`, input.value);
    } else if (input.value && parameter.in === "query") query.append(parameter.name, input.value);
    else if (input.value && parameter.in === "header") headers[parameter.name] = input.value;
  }
  let sent;
  if (body.fields) {
    sent = new FormData();
    for (const { name, input } of body.fields) {
      if (input.type === "file") input.files[0] && sent.append(name, input.files[0]);
      else if (input.value) sent.append(name, input.value);
    }
  } else if (body.input) {
    sent = body.input.type === "file" ? body.input.files[0] : body.input.value;
    headers["content-type"] = body.media;
  }
  const asked = query.toString();
  return [`.${place}${asked ? `?${asked}` : ""}`, { method: method.toUpperCase(), headers, body: sent }];
}

async function send(path, method, inputs, body, shown) {
  shown.textContent = "...";
  try {
    const response = await fetch(...requestOf(path, method, inputs, body));
    const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    shown.textContent = `${response.status} ${response.statusText}\n${headers}\n\n`;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const isJson = (response.headers.get("content-type") || "").startsWith("application/json");
    let text = "";
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      text += piece.value;
      // Streams are shown as they come.
      if (!isJson) shown.append(piece.value);
    }
    if (isJson) shown.append(JSON.stringify(JSON.parse(text), null, 2));
  } catch (error) {
    shown.append(`failed: ${error}`);
  }
}

function card(path, method, operation, api) {
  const inputs = [], body = {}, shown = make("pre");
  const button = make("button", { type: "button" }, "Send");
  button.addEventListener("click", () => send(path, method, inputs, body, shown));
  return make("details", {},
    make("summary", {}, make("span", { class: "method" }, method.toUpperCase()), make("code", {}, path),
      ` ${operation.summary || ""}`),
    make("div", {}, make("p", {}, operation.description || ""), ...parameterInputs(operation, inputs),
      ...bodyInputs(operation, api, body), button, shown));
}

async function show() {
  const api = await (await fetch("./openapi.json")).json();
  document.getElementById("title").textContent = api.info.title;
  document.getElementById("description").textContent = api.info.description || "";
  const groups = new Map();
  for (const [path, operations] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const [tag] = operation.tags || ["Others"];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(card(path, method, operation, api));
    }
  }
  const sections = [...groups].map(([tag, cards]) => make("section", {}, make("h2", {}, tag), ...cards));
  document.getElementById("operations").replaceChildren(...sections);
}

show().catch((error) => { document.getElementById("operations").textContent = `The document cannot be read: ${error}`; });
