// What Visual Studio Code does to show a widget: its own manager, on a kernel of a Jupyter server.
import { KernelManager, ServerConnection } from "@jupyterlab/services";

/** Starts a kernel and a manager for it; `run` gives what a cell says, `show` draws the widget that it returned. */
globalThis.connect = async ({ place, token, anywidget }, element) => {
  globalThis.vscIPyWidgets8.load();
  globalThis.requirejs.config({ paths: { anywidget } });
  const address = { baseUrl: `http://${place}/`, wsUrl: `ws://${place}/` };
  const settings = { ...address, token, appendToken: true };
  const kernels = new KernelManager({ serverSettings: ServerConnection.makeSettings(settings) });
  await kernels.ready;
  const kernel = await kernels.startNew({ name: "python3" });
  const loader = {
    widgetsRegisteredInRequireJs: new Set(),
    loadWidgetScript: async () => {},
    successHandler: () => {},
    errorHandler: (...what) => console.error(what.join(" ")),
  };
  const manager = new globalThis.vscIPyWidgets.WidgetManager(kernel, element, loader, () => {});
  globalThis.run = async (code) => {
    const said = { text: "", widget: null };
    const future = kernel.requestExecute({ code });
    future.onIOPub = ({ content }) => {
      said.text += content.text ?? content.evalue ?? "";
      said.widget ??= content.data?.["application/vnd.jupyter.widget-view+json"]?.model_id;
    };
    await future.done;
    return said;
  };
  globalThis.show = async (id) => {
    const view = await manager.create_view(await manager.get_model(id), { el: element });
    await manager.display_view(null, view, { node: element });
  };
};
